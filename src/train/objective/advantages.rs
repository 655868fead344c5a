//! Rewards to advantages: how much better an answer is than the others of its group.

/// What the differences from a group's mean are divided by.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ScaleRewards {
    /// The standard deviation of the group, as published.
    #[default]
    Group,
    /// The standard deviation of all answers of the rollout.
    Batch,
    /// Nothing (Dr. GRPO): groups that nearly agree do not count more.
    None,
}

/// Added to a standard deviation.
const SMALL: f64 = 1e-4;

/// Standard deviation with one degree of freedom less, as PyTorch's; 0 of fewer than two values.
fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let squares: f64 = values
        .iter()
        .map(|value| (value - mean) * (value - mean))
        .sum();
    match values.len() {
        0 | 1 => 0.0,
        count => (squares / (count - 1) as f64).sqrt(),
    }
}

/// Advantages of answers whose rewards are given group after group, `group` answers each.
///
/// Source: `GRPOTrainer._generate_and_score_completions`, TRL 1.16.
pub fn advantages(rewards: &[f64], group: usize, scale: ScaleRewards) -> Vec<f32> {
    let of_all = deviation(rewards);
    let groups = rewards.chunks(group.max(1)).flat_map(|group| {
        let mean = group.iter().sum::<f64>() / group.len() as f64;
        let by = match scale {
            ScaleRewards::Group => deviation(group) + SMALL,
            ScaleRewards::Batch => of_all + SMALL,
            ScaleRewards::None => 1.0,
        };
        group
            .iter()
            .map(move |reward| ((reward - mean) / by) as f32)
    });
    groups.collect()
}

/// Share of groups whose answers all have the same reward: nothing is learnt from them.
pub fn share_without_difference(rewards: &[f64], group: usize) -> f64 {
    let groups: Vec<_> = rewards.chunks(group.max(1)).collect();
    let same = groups
        .iter()
        .filter(|group| deviation(group) < 1e-9)
        .count();
    same as f64 / groups.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_measured_by_itself() {
        let rewards = [1.0, 0.0, 0.5, 0.5, 3.0, 3.0, 3.0, 3.0];
        let found = advantages(&rewards, 4, ScaleRewards::Group);
        // Deviation √(0.5/3) = 0.40825.
        let want = 0.5 / (0.5_f64 / 3.0).sqrt();
        assert!((f64::from(found[0]) - want).abs() < 1e-3, "{found:?}");
        assert_eq!(&found[2..], [0.0; 6]);
        assert_eq!(
            advantages(&rewards, 4, ScaleRewards::None)[..2],
            [0.5, -0.5]
        );
        assert!((share_without_difference(&rewards, 4) - 0.5).abs() < 1e-12);
    }
}
