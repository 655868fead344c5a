//! How the windows of a run are shared out among processes.

use std::ops::Range;

/// Which devices of a run belong to this process, where there are several processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The first of them among all.
    pub first: usize,
    /// How many they are.
    pub count: usize,
    /// Devices of all processes.
    pub of: usize,
}

impl Share {
    /// Which of `items` a device takes: each a part of the same length, or one longer, in their order.
    pub(super) fn part(items: usize, device: usize, devices: usize) -> Range<usize> {
        let (each, more) = (items / devices, items % devices);
        let start = device * each + device.min(more);
        start..start + each + usize::from(device < more)
    }

    /// Whether the item with this number, dealt out to the devices in turn, belongs to this process.
    pub fn takes(&self, number: usize) -> bool {
        (self.first..self.first + self.count).contains(&(number % self.of))
    }
}

/// Parts of a window for each device, in their order, so that what devices add up one after the other is what one
/// device would add up; a partial window is shared as well.
pub fn dealt_out<T>(all: Vec<T>, devices: usize) -> Vec<Vec<T>> {
    let items = all.len();
    let mut all = all.into_iter();
    (0..devices)
        .map(|device| {
            let part = Share::part(items, device, devices);
            all.by_ref().take(part.len()).collect()
        })
        .collect()
}
