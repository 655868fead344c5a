//! What a model has to beat: reports that cost no look at the image, or a look for no finding.

pub mod search;
pub mod systems;
