//! Probabilities of findings: from log-probabilities of sentences to calibrated numbers, decisions and their scores.
//!
//! A model that was trained on reports is not asked a question it has never seen. By default it draws several reports
//! about an image, and the share of them that state a class is its probability ([`evidence`]): any wording counts that
//! the labeler reads. Or [`wordings`] are sentences as reports have them, one set that states a class and one that
//! denies it, and the difference of their log-probabilities is the logit of the class ([`logit`]). [`calibration`]
//! turns logits into probabilities and decisions, [`metrics`] and [`evaluation`] say how good they are. Nothing here
//! knows the model.

pub mod calibration;
pub mod comparison;
pub mod evaluation;
pub mod evidence;
pub mod fit;
pub mod judged;
pub mod logit;
pub mod metrics;
pub mod read;
pub mod sentences;
pub mod thresholds;
pub mod wordings;
