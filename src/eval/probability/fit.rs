//! Temperature and biases by maximum likelihood: `p = sigmoid(logit / temperature + bias of the class)`.
//!
//! One temperature for all classes, since it says how overconfident the model is; a bias for each, since how often
//! a class is stated and how its sentences begin differs from class to class. The biases are drawn to a common one by
//! an L2 penalty: a class that occurs once, or never, has no maximum of its own (its bias would go to minus
//! infinity), and with the penalty it takes over what the others say.

use super::logit::sigmoid;

/// Weight of the penalty `½ λ (bias - common)²`: a normal prior of width 3 in logits, as biases differ on the tiny
/// model. A handful of cases of a class outweighs it.
pub const BIAS_PENALTY: f64 = 0.1;

/// Weight of a penalty that keeps slope and common bias finite where the classes are separated without error.
const RIDGE: f64 = 1e-3;

/// Slope that stands for "says nothing": the inverse of the highest temperature.
const LEAST_SLOPE: f64 = 1e-2;

/// Newton steps; a convex loss of this size needs a dozen.
const MOST_STEPS: usize = 100;

/// What was fitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// Logits are divided by it.
    pub temperature: f64,
    /// Added after that, one a class.
    pub biases: Vec<f64>,
    /// Whether logits do not rise with the truth: the temperature is at its highest then.
    pub useless: bool,
}

/// Fits `classes`, each with logits and whether the class is there.
pub fn fit(classes: &[Vec<(f64, bool)>]) -> Fit {
    let free = minimise(classes, None);
    let useless = free[0] < LEAST_SLOPE;
    let found = if useless {
        minimise(classes, Some(LEAST_SLOPE))
    } else {
        free
    };
    Fit {
        temperature: 1.0 / found[0],
        biases: found[2..].iter().map(|own| found[1] + own).collect(),
        useless,
    }
}

/// Mean negative log-likelihood of probabilities; a probability of 0 or 1 that is wrong costs at most 34.5.
pub fn mean_loss(cases: impl Iterator<Item = (f64, bool)>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for (probability, truth) in cases {
        let right = if truth {
            probability
        } else {
            1.0 - probability
        };
        sum -= right.max(1e-15).ln();
        count += 1.0;
    }
    sum / count
}

/// Slope, common bias, and each class's own.
fn minimise(classes: &[Vec<(f64, bool)>], slope: Option<f64>) -> Vec<f64> {
    let size = 2 + classes.len();
    let mut at = vec![0.0; size];
    at[0] = slope.unwrap_or(1.0);
    let mut loss = value(classes, &at);
    for _ in 0..MOST_STEPS {
        let (mut gradient, mut curvature) = derivatives(classes, &at);
        if slope.is_some() {
            gradient[0] = 0.0;
            curvature[0].fill(0.0);
            curvature.iter_mut().for_each(|row| row[0] = 0.0);
            curvature[0][0] = 1.0;
        }
        let step = solve(curvature, &gradient);
        // The loss is convex: a step that is too long is halved.
        let mut length = 1.0;
        let mut better = None;
        while length > 1e-10 {
            let next: Vec<f64> = at.iter().zip(&step).map(|(x, d)| x - length * d).collect();
            let found = value(classes, &next);
            if found < loss {
                better = Some((next, found));
                break;
            }
            length *= 0.5;
        }
        let Some((next, found)) = better else {
            break;
        };
        let gained = loss - found;
        (at, loss) = (next, found);
        if gained < 1e-12 * (1.0 + loss.abs()) {
            break;
        }
    }
    at
}

fn value(classes: &[Vec<(f64, bool)>], at: &[f64]) -> f64 {
    let mut loss = 0.5 * RIDGE * ((at[0] - 1.0).powi(2) + at[1] * at[1]);
    for (class, own) in classes.iter().zip(&at[2..]) {
        loss += 0.5 * BIAS_PENALTY * own * own;
        for (logit, truth) in class {
            let x = at[0] * logit + at[1] + own;
            let against = if *truth { -x } else { x };
            // ln(1 + exp(x)) without overflow.
            loss += against.max(0.0) + (-against.abs()).exp().ln_1p();
        }
    }
    loss
}

fn derivatives(classes: &[Vec<(f64, bool)>], at: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let size = at.len();
    let mut gradient = vec![0.0; size];
    let mut curvature = vec![vec![0.0; size]; size];
    gradient[0] = RIDGE * (at[0] - 1.0);
    gradient[1] = RIDGE * at[1];
    curvature[0][0] = RIDGE;
    curvature[1][1] = RIDGE;
    for (index, class) in classes.iter().enumerate() {
        let own = 2 + index;
        gradient[own] += BIAS_PENALTY * at[own];
        curvature[own][own] += BIAS_PENALTY;
        for (logit, truth) in class {
            let p = sigmoid(at[0] * logit + at[1] + at[own]);
            let error = p - f64::from(u8::from(*truth));
            let weight = p * (1.0 - p);
            for (row, by_row) in [(0, *logit), (1, 1.0), (own, 1.0)] {
                gradient[row] += error * by_row;
                for (column, by_column) in [(0, *logit), (1, 1.0), (own, 1.0)] {
                    curvature[row][column] += weight * by_row * by_column;
                }
            }
        }
    }
    (gradient, curvature)
}

/// Solves a positive definite system by elimination.
fn solve(mut matrix: Vec<Vec<f64>>, right: &[f64]) -> Vec<f64> {
    let mut x = right.to_vec();
    let size = x.len();
    for pivot in 0..size {
        let (above, below) = matrix.split_at_mut(pivot + 1);
        let pivot_row = &above[pivot];
        for (offset, row) in below.iter_mut().enumerate() {
            let factor = row[pivot] / pivot_row[pivot];
            if factor != 0.0 {
                for column in pivot..size {
                    row[column] -= factor * pivot_row[column];
                }
                x[pivot + 1 + offset] -= factor * x[pivot];
            }
        }
    }
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size)
            .map(|column| matrix[row][column] * x[column])
            .sum();
        x[row] = (x[row] - known) / matrix[row][row];
    }
    x
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Cases whose truth follows `sigmoid(logit / temperature + bias)`.
    fn drawn(temperature: f64, biases: &[f64], cases: usize) -> Vec<Vec<(f64, bool)>> {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let class = |bias: &f64| {
            (0..cases)
                .map(|_| {
                    let logit = rng.random_range(-12.0..12.0);
                    let p = sigmoid(logit / temperature + bias);
                    (logit, rng.random::<f64>() < p)
                })
                .collect()
        };
        biases.iter().map(class).collect()
    }

    #[test]
    fn the_temperature_that_the_cases_were_drawn_with_is_found() {
        let biases = [0.0, -1.5, 0.8];
        let found = fit(&drawn(3.0, &biases, 4000));
        // The standard error of the temperature is some 0.05 with 12,000 cases.
        assert!((found.temperature - 3.0).abs() < 0.2, "{found:?}");
        for (bias, expected) in found.biases.iter().zip(biases) {
            assert!((bias - expected).abs() < 0.2, "{found:?}");
        }
        assert!(!found.useless);
    }

    #[test]
    fn a_class_without_a_case_takes_over_the_common_bias_and_one_that_never_occurs_stays_finite() {
        let mut classes = drawn(2.0, &[-1.0, -1.0], 1000);
        classes.push(Vec::new());
        classes.push((0..50).map(|at| (f64::from(at) / 50.0, false)).collect());
        let found = fit(&classes);
        // Drawn to the mean of the others, the class that never occurs among them.
        assert!((-3.0..-0.5).contains(&found.biases[2]), "{found:?}");
        let never = found.biases[3];
        assert!(never < found.biases[2] && never > -15.0, "{found:?}");
    }

    #[test]
    fn separated_classes_and_logits_that_say_the_opposite_end_in_numbers() {
        let separated = vec![(0..40).map(|at| (f64::from(at - 20), at >= 20)).collect()];
        let found = fit(&separated);
        assert!(
            found.temperature.is_finite() && found.temperature > 0.0,
            "{found:?}"
        );
        let opposite = vec![(0..40).map(|at| (f64::from(at - 20), at < 20)).collect()];
        let found = fit(&opposite);
        assert!(found.useless && found.temperature == 100.0, "{found:?}");
    }

    #[test]
    fn fitting_lowers_the_loss() {
        let classes = drawn(4.0, &[-2.0], 500);
        let found = fit(&classes);
        let loss = |temperature: f64, bias: f64| {
            let cases = classes[0].iter();
            mean_loss(cases.map(|(logit, truth)| (sigmoid(logit / temperature + bias), *truth)))
        };
        assert!(loss(found.temperature, found.biases[0]) < loss(1.0, 0.0));
    }
}
