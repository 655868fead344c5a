//! What every layer above stands on and none of them owns: knows nothing of models, training or reports.

pub mod plot;
