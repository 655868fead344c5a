//! Cache beside a module's weights for what a backend derives from them.

use std::{
    any::Any,
    fmt,
    marker::PhantomData,
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

/// What is cached, once something is.
type Anything = Option<Box<dyn Any + Send>>;

/// A field of a module that holds no parameter: what a backend caches for the weights beside it.
///
/// Clones share it, as they share the weights. It is emptied by everything that may give the
/// module other weights or another device, and closed in what a model in training is validated with,
/// whose weights change with every step.
// The backend is named so that the derived code of the module around it sees a module here, and not a
// constant, which it would clone into every mapped copy.
#[derive(Clone)]
pub struct Kept<B>(Option<Arc<Mutex<Anything>>>, PhantomData<B>);

impl<B> Default for Kept<B> {
    fn default() -> Self {
        Self(Some(Arc::default()), PhantomData)
    }
}

impl<B> Kept<B> {
    /// Locks what is cached; `None` where nothing may be.
    pub fn lock(&self) -> Option<MutexGuard<'_, Anything>> {
        let kept = self.0.as_ref()?;
        Some(kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<B> fmt::Debug for Kept<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

impl<B: Backend> Module<B> for Kept<B> {
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

impl<B: AutodiffBackend> AutodiffModule<B> for Kept<B> {
    type InnerModule = Kept<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        Kept(None, PhantomData)
    }

    fn from_inner(_module: Self::InnerModule) -> Self {
        Self::default()
    }
}

impl<B: Backend> ModuleDisplayDefault for Kept<B> {
    fn content(&self, content: Content) -> Option<Content> {
        Some(content)
    }
}

impl<B: Backend> ModuleDisplay for Kept<B> {}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::{backend::Autodiff, module::Param};
    use burn_flex::Flex;

    /// A module as the derived code makes it.
    #[derive(Module, Debug)]
    struct Holder<B: Backend> {
        weight: Param<Tensor<B, 1>>,
        kept: Kept<B>,
    }

    fn held<B>(kept: &Kept<B>) -> Option<u32> {
        let held = kept.lock()?;
        held.as_ref()
            .and_then(|held| held.downcast_ref::<u32>().copied())
    }

    #[test]
    fn clones_share_mapping_forgets_and_validation_keeps_nothing() {
        type AB = Autodiff<Flex>;
        struct Nothing;
        impl ModuleMapper<AB> for Nothing {}
        let device = Default::default();
        let module = Holder::<AB> {
            weight: Param::from_tensor(Tensor::ones([2], &device)),
            kept: Kept::default(),
        };
        *module.kept.lock().unwrap() = Some(Box::new(7_u32));
        assert_eq!(held(&module.clone().kept), Some(7));
        let valid = module.valid();
        assert!(valid.kept.lock().is_none());
        let mapped = module.clone().map(&mut Nothing);
        assert_eq!((held(&module.kept), held(&mapped.kept)), (Some(7), None));
        assert!(mapped.kept.lock().is_some());
        assert_eq!(held(&module.fork(&device).kept), None);
    }
}
