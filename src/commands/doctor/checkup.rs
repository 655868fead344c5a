//! How the answers of a device compare with the CPU's.

use burn::tensor::DType;

use super::answers::DeviceAnswers;
use crate::commands::logits::{larger_or_nan, relative_distance};

/// How a part compares.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Agreement {
    /// Relative distance and what is allowed.
    Measured(f64, f64),
    /// The driver's or the program's own words.
    Failed(String),
    /// There is nothing to compare with.
    Unknown,
}

impl Agreement {
    /// Whether the part was compared and is too far; a NaN is too far.
    pub(super) fn is_bad(&self) -> bool {
        match self {
            Self::Measured(distance, allowed) => distance.is_nan() || distance > allowed,
            Self::Failed(_) => true,
            Self::Unknown => false,
        }
    }
}

/// How a device does in one type.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checkup {
    /// The type of the weights.
    pub(super) dtype: DType,
    /// Logits of a prompt.
    pub(super) forward: Agreement,
    /// Cached decoding.
    pub(super) decoding: Agreement,
    /// Gradients of an adapter.
    pub(super) gradient: Agreement,
}

impl Checkup {
    /// Whether all that could be compared agrees.
    pub(super) fn is_good(&self) -> bool {
        ![&self.forward, &self.decoding, &self.gradient]
            .iter()
            .any(|agreement| agreement.is_bad())
    }
}

/// Relative distance allowed in a type. The half types round every activation of eight layers to 8 or
/// 11 bits; f32 allows for TF32 matmuls, which CUDA backends use for f32.
pub(super) fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 8e-2,
        DType::F16 => 2e-2,
        _ => 5e-3,
    }
}

/// Compares the answers of a device with those of the CPU in f32.
pub(super) fn compare(
    dtype: DType,
    answers: Result<DeviceAnswers, String>,
    cpu: Option<&DeviceAnswers>,
) -> Checkup {
    let allowed = allowed(dtype);
    let answers = match answers {
        Ok(answers) => answers,
        Err(reason) => {
            return Checkup {
                dtype,
                forward: Agreement::Failed(reason),
                decoding: Agreement::Unknown,
                gradient: Agreement::Unknown,
            };
        }
    };
    let (forward, gradient) = match cpu {
        None => (Agreement::Unknown, Agreement::Unknown),
        Some(cpu) => {
            let forward = relative_distance(&answers.logits, &cpu.logits);
            // By tensor: a small wrong one must not vanish beside a large one.
            let gradient = answers
                .gradients
                .iter()
                .flat_map(|named| {
                    named
                        .iter()
                        .map(|(name, ours)| relative_distance(ours, &cpu.gradients[0][name]))
                })
                .fold(0.0, larger_or_nan);
            (
                Agreement::Measured(forward, allowed),
                // A gradient has passed through twice as many roundings.
                Agreement::Measured(gradient, 2.0 * allowed),
            )
        }
    };
    Checkup {
        dtype,
        forward,
        decoding: Agreement::Measured(answers.decoding, allowed),
        gradient,
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::{super::answers::answers, *};
    use burn_flex::Flex;

    fn cpu() -> DeviceAnswers {
        answers::<Flex>(&Default::default(), DType::F32).unwrap()
    }

    #[test]
    fn the_cpu_agrees_with_itself_and_has_gradients() {
        let cpu = cpu();
        assert!(cpu.logits.iter().all(|value| value.is_finite()));
        assert!(cpu.gradients[0].len() >= 4 * 2);
        assert_eq!(cpu.gradients[0].len(), cpu.gradients[1].len());
        for gradient in cpu.gradients[0].values() {
            assert!(gradient.iter().any(|value| value.abs() > 1e-6));
        }
        let checkup = compare(DType::F32, Ok(cpu.clone()), Some(&cpu));
        assert!(checkup.is_good(), "{checkup:?}");
    }

    #[test]
    fn wrong_answers_are_found() {
        let cpu = cpu();
        let spoiled = |spoil: &dyn Fn(&mut DeviceAnswers)| {
            let mut answers = cpu.clone();
            spoil(&mut answers);
            compare(DType::F16, Ok(answers), Some(&cpu))
        };
        let logits = spoiled(&|answers| answers.logits[3] = f32::NAN);
        assert!(logits.forward.is_bad() && !logits.gradient.is_bad());
        // One tensor of many, as large as it should be, and wrong.
        let gradient = spoiled(&|answers| {
            let values = answers.gradients[1].values_mut().next().unwrap();
            values.iter_mut().for_each(|value| *value = -*value);
        });
        assert!(!gradient.forward.is_bad() && gradient.gradient.is_bad());
        let decoding = spoiled(&|answers| answers.decoding = 0.4);
        assert!(decoding.decoding.is_bad() && !decoding.is_good());
        let failed = compare(DType::F16, Err("no".into()), Some(&cpu));
        assert!(!failed.is_good());
    }
}
