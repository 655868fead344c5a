//! Studies in and reports out: DICOM's network, DICOMweb, watched folders; reports as DICOM SR, PDF, FHIR and HL7.
//!
//! Knows the store, and neither HTTP handlers nor the model. All threads here block; whatever waits has an end. Nothing of a
//! patient gets into logs, errors or addresses: they name our ids, peers and reasons.

mod dicomweb;
mod dimse;
pub mod intake;
pub mod outbox;
pub mod poll;
pub mod receive;
pub mod report;
mod send;
#[cfg(test)]
mod tests;
mod uid;
pub mod watch;
