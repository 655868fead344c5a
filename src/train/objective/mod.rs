//! What a run minimises besides cross-entropy: preferences (DPO) and rewards (GRPO).

pub mod advantages;
pub mod dpo;
pub mod grpo;
pub mod reference;
pub mod rewards;
pub mod rollouts;
pub mod settings;
pub mod sums;
pub mod watch;
