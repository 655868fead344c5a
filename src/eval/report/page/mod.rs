//! An outcome as one HTML file that needs nothing beside it: Chinese first, light and dark, searchable.

mod facts;
mod findings;
mod gallery;
mod head;
mod html;
mod judge;
pub(super) mod markup;
mod probabilities;
mod rollouts;
mod scores;
mod subgroups;

pub use facts::PageFacts;
pub use gallery::CaseImages;
pub use html::html;
pub use rollouts::PageRollout;
