//! Sums over the units that work on one result.

use cubecl::{features::Plane, prelude::*};

/// Units that work on one result together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Group {
    /// How many.
    pub lanes: usize,
    /// Whether they are a plane, which sums without shared memory; else they are a whole cube.
    pub plane: bool,
}

/// Units of a cube that stands in for a plane.
const LANES: usize = 32;

impl Group {
    /// The adapter's planes where all have one size, else cubes of [`LANES`] units.
    ///
    /// Adapters that choose a plane's size for each kernel do not say what they chose.
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

    /// A cube of this many units that works on one result.
    pub(super) const fn cube(units: usize) -> Self {
        Self {
            lanes: units,
            plane: false,
        }
    }
}

/// The sum over a group's units, known to all of them.
///
/// Every unit of the cube has to come here.
#[cube]
pub(super) fn group_sum(value: f32, #[comptime] group: Group) -> f32 {
    if comptime!(group.plane) {
        plane_sum(value)
    } else {
        let mut shared = SharedMemory::<f32>::new(comptime!(group.lanes));
        let unit = UNIT_POS as usize;
        sync_cube();
        shared[unit] = value;
        sync_cube();
        let mut width = comptime!(group.lanes.next_power_of_two() / 2).runtime();
        while width > 0 {
            if unit < width && unit + width < comptime!(group.lanes) {
                let other = shared[unit + width];
                shared[unit] += other;
            }
            sync_cube();
            width /= 2;
        }
        shared[0]
    }
}
