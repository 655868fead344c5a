//! The backend under test.

#[cfg(feature = "flex")]
pub type TestBackend = burn_flex::Flex;

pub fn device() -> burn::tensor::Device<TestBackend> {
    Default::default()
}
