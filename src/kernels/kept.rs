//! Room beside a module's weights for what a backend makes out of them.

use std::{
    any::Any,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{
    module::{
        AutodiffModule, Content, Devices, EmptyRecord, Module, ModuleDisplay, ModuleDisplayDefault,
        ModuleMapper, ModuleVisitor,
    },
    prelude::*,
    tensor::backend::AutodiffBackend,
};

/// A field of a module that holds no parameter: what a backend keeps for the weights beside it.
///
/// Clones share it, as they share the weights. It is empty again behind everything that may give the
/// module other weights or another device.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<Option<Box<dyn Any + Send>>>>);

impl Kept {
    /// What is kept, for one user at a time.
    pub fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

impl<B: Backend> Module<B> for Kept {
    type Record = EmptyRecord;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        devices
    }

    fn fork(self, _device: &B::Device) -> Self {
        Self::default()
    }

    fn to_device(self, _device: &B::Device) -> Self {
        Self::default()
    }

    fn visit<V: ModuleVisitor<B>>(&self, _visitor: &mut V) {}

    fn map<M: ModuleMapper<B>>(self, _mapper: &mut M) -> Self {
        Self::default()
    }

    fn load_record(self, _record: Self::Record) -> Self {
        Self::default()
    }

    fn into_record(self) -> Self::Record {
        EmptyRecord
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Kept {
    type InnerModule = Self;

    fn valid(&self) -> Self {
        Self::default()
    }

    fn from_inner(_module: Self) -> Self {
        Self::default()
    }
}

impl ModuleDisplayDefault for Kept {
    fn content(&self, content: Content) -> Option<Content> {
        Some(content)
    }
}

impl ModuleDisplay for Kept {}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    #[test]
    fn clones_share_and_mapping_forgets() {
        struct Nothing;
        impl ModuleMapper<Flex> for Nothing {}
        let kept = Kept::default();
        let clone = kept.clone();
        *kept.lock() = Some(Box::new(7_u32));
        let held = |kept: &Kept| {
            let held = kept.lock();
            held.as_ref()
                .and_then(|held| held.downcast_ref::<u32>().copied())
        };
        assert_eq!(held(&clone), Some(7));
        let mapped = Module::<Flex>::map(clone, &mut Nothing);
        assert_eq!((held(&kept), held(&mapped)), (Some(7), None));
    }
}
