//! A range of values with its ticks and their texts.

/// How the values of an axis are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AxisScale {
    /// Equal steps.
    #[default]
    Linear,
    /// Equal factors; values of 0 and below are left out.
    Log,
}

/// A range of values, its spread and its ticks.
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) scale: AxisScale,
    pub(super) ticks: Vec<f64>,
}

impl Axis {
    /// An axis that holds all `values` with a little room; `None` without any that can be drawn.
    pub(super) fn around(values: impl Iterator<Item = f64>, scale: AxisScale) -> Option<Self> {
        let shown = |v: &f64| v.is_finite() && (scale == AxisScale::Linear || *v > 0.0);
        let (low, high) = values
            .filter(shown)
            .map(|v| (v, v))
            .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
        if scale == AxisScale::Log {
            let (low, high) = if low < high {
                (low, high)
            } else {
                (low / 2.0, high * 2.0)
            };
            let room = (high / low).powf(0.04);
            let (low, high) = (low / room, high * room);
            return Some(Self {
                low,
                high,
                scale,
                ticks: log_ticks(low, high),
            });
        }
        let room = if low < high {
            (high - low) * 0.05
        } else {
            low.abs().max(1.0) * 0.5
        };
        // Room below zero would suggest values that cannot be.
        let bottom = if low >= 0.0 {
            (low - room).max(0.0)
        } else {
            low - room
        };
        Some(Self::exact(bottom, high + room))
    }

    pub(super) fn exact(low: f64, high: f64) -> Self {
        Self {
            low,
            high,
            scale: AxisScale::Linear,
            ticks: linear_ticks(low, high),
        }
    }

    /// Where a value is, 0 at the low end and 1 at the high one.
    pub(super) fn place(&self, value: f64) -> f64 {
        match self.scale {
            AxisScale::Linear => (value - self.low) / (self.high - self.low),
            AxisScale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        }
    }

    /// Tick texts, all with as many decimals as the finest step needs.
    pub(super) fn labels(&self) -> Vec<String> {
        let largest = self
            .ticks
            .iter()
            .fold(0.0_f64, |most, tick| most.max(tick.abs()));
        if self.scale == AxisScale::Log || self.ticks.len() < 2 || !(1e-3..1e6).contains(&largest) {
            return self.ticks.iter().map(|tick| short_number(*tick)).collect();
        }
        let step = self.ticks[1] - self.ticks[0];
        let decimals = (0..=8)
            .find(|&decimals| {
                let scaled = step * 10_f64.powi(decimals);
                (scaled - scaled.round()).abs() < 1e-6 * scaled
            })
            .unwrap_or(8) as usize;
        self.ticks
            .iter()
            .map(|tick| format!("{tick:.decimals$}"))
            .collect()
    }
}

/// The smallest of 1, 2, 2.5 and 5 × 10^k that cuts `span` into at most `count` parts.
pub(super) fn nice_step(span: f64, count: usize) -> f64 {
    let rough = span / count as f64;
    let unit = 10_f64.powf(rough.log10().floor());
    let fits = |factor: &&f64| **factor * unit >= rough * (1.0 - 1e-9);
    [1.0, 2.0, 2.5, 5.0].iter().find(fits).unwrap_or(&10.0) * unit
}

fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let step = nice_step(high - low, 6);
    if !(step.is_finite() && step > 0.0) {
        return Vec::new();
    }
    let first = (low / step - 1e-9).ceil();
    // Multiples rather than sums, so that no tick reads 0.30000000000000004; `+ 0.0` turns -0 to 0.
    let tick = |index: usize| (first + index as f64) * step + 0.0;
    (0..20)
        .map(tick)
        .take_while(|tick| *tick <= high + step * 1e-9)
        .collect()
}

fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let within = |tick: &f64| *tick >= low && *tick <= high;
    let all = |factors: &'static [f64], every: usize| -> Vec<f64> {
        let powers = decades.clone().step_by(every);
        powers
            .flat_map(|p| factors.iter().map(move |f| f * 10_f64.powi(p)))
            .filter(within)
            .collect()
    };
    let every = (decades.clone().count() / 8).max(1);
    let ticks = all(&[1.0], every);
    if ticks.len() >= 3 {
        return ticks;
    }
    let finer = all(&[1.0, 2.0, 5.0], 1);
    if finer.len() >= 2 {
        finer
    } else {
        linear_ticks(low, high)
    }
}

/// Few characters for a number: `0`, `0.25`, `1.5e-4`, `20000`.
pub(super) fn short_number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let trimmed = |text: String| {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_string()
        } else {
            text
        }
    };
    if (1e-3..1e6).contains(&value.abs()) {
        let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
        return trimmed(format!("{value:.decimals$}"));
    }
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((digits, exponent)) => format!("{}e{exponent}", trimmed(digits.to_string())),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(
            linear_ticks(0.0, 1.0),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(linear_ticks(-3.0, 12.0), [-2.5, 0.0, 2.5, 5.0, 7.5, 10.0]);
        assert_eq!(linear_ticks(1.0, 1.0), [0.0; 0]);
        assert_eq!(log_ticks(0.5, 2000.0), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(log_ticks(1.5, 30.0), [2.0, 5.0, 10.0, 20.0]);
        assert!(log_ticks(1.1, 1.3).len() >= 2);
        assert_eq!(
            Axis::exact(0.0, 1.0).labels(),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 1e-4, 2.5e-5, 0.25, 573.0, 20000.0, -1.5, 3e7].map(short_number);
        assert_eq!(
            shown,
            ["0", "1e-4", "2.5e-5", "0.25", "573", "20000", "-1.5", "3e7"]
        );
    }
}
