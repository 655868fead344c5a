//! Sums (reductions) over the units that compute one result.

use cubecl::{features::Plane, prelude::*};

/// Units that compute one result together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Group {
    /// How many.
    pub lanes: usize,
    /// Whether they are a plane, which sums without shared memory; else they are a whole cube.
    pub plane: bool,
}

/// Units of a cube that replaces a plane.
const LANES: usize = 32;

/// Units of a cube of planes.
pub(super) const UNITS: usize = 256;

impl Group {
    /// Groups of a cube.
    pub(super) fn in_a_cube(self) -> usize {
        if self.plane { UNITS / self.lanes } else { 1 }
    }

    /// The adapter's planes where all have one size, else cubes of [`LANES`] units.
    ///
    /// Adapters that choose a plane's size for each kernel do not report it.
    pub(super) fn of<R: Runtime>(client: &ComputeClient<R>) -> Self {
        let properties = client.properties();
        let (least, most) = (
            properties.hardware.plane_size_min,
            properties.hardware.plane_size_max,
        );
        let plane = properties.features.plane.contains(Plane::Ops)
            && least == most
            && (16..=64).contains(&most);
        Self {
            lanes: if plane { most as usize } else { LANES },
            plane,
        }
    }
}

/// The sum over a group's units, returned to all of them; every unit of the cube must call it (barrier).
#[cube]
pub(super) fn group_sum(value: f32, #[comptime] group: Group) -> f32 {
    if comptime!(group.plane) {
        plane_sum(value)
    } else {
        cube_sum(value, comptime!(group.lanes))
    }
}

/// The sum over the units of a cube, returned to all of them; every unit must call it (barrier).
#[cube]
pub(super) fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = SharedMemory::<f32>::new(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut width = comptime!(units.next_power_of_two() / 2).runtime();
    while width > 0 {
        if unit < width && unit + width < units {
            let other = shared[unit + width];
            shared[unit] += other;
        }
        sync_cube();
        width /= 2;
    }
    let sum = shared[0];
    // The shared memory may be reused at once.
    sync_cube();
    sum
}
