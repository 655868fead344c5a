//! What every layer above uses and none of them owns: nothing here knows of models, training or reports.

pub mod plot;
