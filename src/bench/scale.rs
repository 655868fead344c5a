//! Scale on paper: what a step of data-parallel training takes on several nodes, from a step measured on one.
//!
//! Every node computes its share as before and then adds up gradients with the others. The sum is that of
//! NCCL's ring, or of the chain that goes through sockets; both send each gradient over each connection. What
//! overlaps with the backward pass is simulated bucket by bucket. Nothing is measured here.

use serde::Serialize;

/// Bytes of a gradient: they are summed in f32.
const GRADIENT_BYTES: f64 = 4.0;
/// Share of a training step's time in the backward pass, where only adapters are trained: two of five
/// matmuls' worth forward, three backward.
const BACKWARD_SHARE: f64 = 0.6;
/// Bytes of a piece in which numbers go through sockets.
const PIECE_BYTES: f64 = 262_144.0;

/// How gradients are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// NCCL's ring.
    Ring,
    /// From neighbour to neighbour and back, in one order.
    Chain,
}

/// A step and the network it is to scale over.
#[derive(Debug, Clone, Copy)]
pub struct ScaleModel {
    /// Seconds of a step on one node, without any sum.
    pub step_seconds: f64,
    /// Samples of that step.
    pub step_samples: f64,
    /// Micro-batches of it, one after the other.
    pub micro_batches: usize,
    /// Trained parameters.
    pub parameters: u64,
    /// Most buckets that the gradients are summed in; the decoder's layers, say.
    pub buckets: usize,
    /// Seconds from one node to the next for the smallest message.
    pub latency_seconds: f64,
    /// Share of the network's rate that arrives.
    pub network_share: f64,
    /// How gradients are added up.
    pub algorithm: Algorithm,
}

/// A step on some nodes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ScaledStep {
    /// Nodes.
    pub nodes: usize,
    /// Rate of each node's connection, in Gbit/s.
    pub gbit_per_second: f64,
    /// Bytes that each node sends in a step.
    pub bytes_sent: f64,
    /// Seconds of the sum alone.
    pub sum_seconds: f64,
    /// Of them, those of waiting for messages rather than for bytes.
    pub latency_seconds: f64,
    /// Seconds of a step whose sum follows the backward pass.
    pub step_seconds: f64,
    /// Seconds of a step whose buckets are summed as they come out of the backward pass.
    pub overlapped_seconds: f64,
    /// Samples a second of all nodes, without overlap.
    pub samples_per_second: f64,
    /// Share of the nodes' own speed that is left, without overlap.
    pub efficiency: f64,
    /// The same with overlap.
    pub overlapped_efficiency: f64,
}

impl ScaleModel {
    fn bytes(&self) -> f64 {
        self.parameters as f64 * GRADIENT_BYTES
    }

    /// Seconds of the sum of some bytes over `nodes`, and those of them that no faster network saves.
    fn sum(&self, bytes: f64, nodes: usize, bytes_per_second: f64) -> [f64; 2] {
        let others = nodes.saturating_sub(1) as f64;
        if others == 0.0 {
            return [0.0, 0.0];
        }
        let latency = 2.0 * others * self.latency_seconds;
        let bytes_seconds = match self.algorithm {
            // Each node sends all but its own part twice: to be added up, and added up.
            Algorithm::Ring => 2.0 * others / nodes as f64 * bytes / bytes_per_second,
            // There and back at once, after the pieces that fill the chain.
            Algorithm::Chain => {
                let piece = bytes.min(PIECE_BYTES);
                (bytes + (2.0 * others - 1.0) * piece) / bytes_per_second
            }
        };
        [latency + bytes_seconds, latency]
    }

    /// Bytes that a node sends in a step; in a chain those of a node with two neighbours.
    fn sent(&self, nodes: usize) -> f64 {
        let others = nodes.saturating_sub(1) as f64;
        match (self.algorithm, nodes) {
            (Algorithm::Ring, _) => 2.0 * others / nodes.max(1) as f64 * self.bytes(),
            (Algorithm::Chain, 0 | 1) => 0.0,
            (Algorithm::Chain, 2) => self.bytes(),
            (Algorithm::Chain, _) => 2.0 * self.bytes(),
        }
    }

    /// A step on some nodes.
    pub fn step(&self, nodes: usize, gbit_per_second: f64) -> ScaledStep {
        let rate = gbit_per_second * 1e9 / 8.0 * self.network_share;
        let [sum_seconds, latency_seconds] = self.sum(self.bytes(), nodes, rate);
        let step_seconds = self.step_seconds + sum_seconds;
        let overlapped_seconds = self.step_seconds + self.exposed(nodes, rate);
        ScaledStep {
            nodes,
            gbit_per_second,
            bytes_sent: self.sent(nodes),
            sum_seconds,
            latency_seconds,
            step_seconds,
            overlapped_seconds,
            samples_per_second: nodes as f64 * self.step_samples / step_seconds,
            efficiency: self.step_seconds / step_seconds,
            overlapped_efficiency: self.step_seconds / overlapped_seconds,
        }
    }

    /// Seconds by which the sum outlasts the backward pass, in as many buckets as are best: each costs its messages.
    fn exposed(&self, nodes: usize, bytes_per_second: f64) -> f64 {
        let counts = 1..=self.buckets.max(1);
        counts
            .map(|buckets| self.exposed_in(buckets, nodes, bytes_per_second))
            .fold(f64::INFINITY, f64::min)
    }

    /// The same in so many buckets, each summed once it is there.
    ///
    /// Only the last micro-batch's backward pass completes gradients.
    fn exposed_in(&self, buckets: usize, nodes: usize, bytes_per_second: f64) -> f64 {
        let [bucket_seconds, _] = self.sum(self.bytes() / buckets as f64, nodes, bytes_per_second);
        let backward = self.step_seconds / self.micro_batches.max(1) as f64 * BACKWARD_SHARE;
        let mut end = 0f64;
        for bucket in 1..=buckets {
            let ready = backward * bucket as f64 / buckets as f64;
            end = end.max(ready) + bucket_seconds;
        }
        end - backward
    }

    /// Trained parameters at which a step on some nodes keeps `efficiency` of its speed and no more.
    pub fn most_parameters(
        &self,
        nodes: usize,
        gbit_per_second: f64,
        efficiency: f64,
        is_overlapped: bool,
    ) -> u64 {
        let keeps = |parameters: u64| {
            let step = Self {
                parameters,
                ..*self
            }
            .step(nodes, gbit_per_second);
            let kept = match is_overlapped {
                true => step.overlapped_efficiency,
                false => step.efficiency,
            };
            kept >= efficiency
        };
        if !keeps(1) {
            return 0;
        }
        let (mut fits, mut fails) = (1u64, 1u64 << 44);
        if keeps(fails) {
            return fails;
        }
        while fails - fits > (fits >> 10).max(1) {
            let middle = fits + (fails - fits) / 2;
            match keeps(middle) {
                true => fits = middle,
                false => fails = middle,
            }
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ScaleModel {
        ScaleModel {
            step_seconds: 0.4,
            step_samples: 16.0,
            micro_batches: 1,
            parameters: 25_000_000,
            buckets: 36,
            latency_seconds: 0.0,
            network_share: 1.0,
            algorithm: Algorithm::Ring,
        }
    }

    #[test]
    fn the_sum_takes_the_time_of_its_bytes_and_messages() {
        // 100 MB over two nodes at 8 Gbit/s: a node sends 100 MB at 1 GB/s.
        let step = model().step(2, 8.0);
        assert!((step.sum_seconds - 0.1).abs() < 1e-9, "{step:?}");
        assert!((step.bytes_sent - 1e8).abs() < 1.0);
        assert!((step.efficiency - 0.8).abs() < 1e-9);
        assert!((step.samples_per_second - 64.0).abs() < 1e-6);
        // Many nodes send twice the bytes.
        let many = model().step(64, 8.0);
        assert!((many.sum_seconds - 2.0 * 63.0 / 64.0 * 0.1).abs() < 1e-9);
        let slow = ScaleModel {
            latency_seconds: 1e-3,
            ..model()
        };
        let step = slow.step(3, 1e9);
        assert!((step.sum_seconds - 4e-3).abs() < 1e-6, "{step:?}");
        let alone = slow.step(1, 8.0);
        assert_eq!((alone.sum_seconds, alone.efficiency), (0.0, 1.0));
        let chain = ScaleModel {
            algorithm: Algorithm::Chain,
            ..model()
        };
        let step = chain.step(2, 8.0);
        assert!((step.sum_seconds - 0.1 - PIECE_BYTES / 1e9).abs() < 1e-9);
    }

    #[test]
    fn buckets_hide_what_the_backward_pass_is_long_enough_for() {
        // 0.24 s of backward pass hide all of 0.1 s but the last of 36 buckets.
        let step = model().step(2, 8.0);
        let exposed = step.overlapped_seconds - 0.4;
        assert!((exposed - 0.1 / 36.0).abs() < 1e-9, "{step:?}");
        // A sum that is longer than the pass is exposed by the difference and the first bucket's wait.
        let slow = model().step(2, 2.0);
        let exposed = slow.overlapped_seconds - 0.4;
        assert!(
            (exposed - (0.4 + 0.24 / 36.0 - 0.24)).abs() < 1e-9,
            "{slow:?}"
        );
        // Where messages cost more than bytes, fewer buckets are better, and never worse than none.
        let distant = ScaleModel {
            latency_seconds: 1e-3,
            ..model()
        };
        let step = distant.step(64, 1000.0);
        assert!(step.overlapped_seconds <= step.step_seconds, "{step:?}");
        // With one bucket nothing overlaps.
        let one = ScaleModel {
            buckets: 1,
            ..model()
        };
        let step = one.step(2, 8.0);
        assert!((step.overlapped_seconds - step.step_seconds).abs() < 1e-9);
        // Of sixteen micro-batches only the last one's pass does.
        let many = ScaleModel {
            micro_batches: 16,
            ..model()
        };
        assert!(many.step(2, 8.0).overlapped_seconds > 0.48);
    }

    #[test]
    fn the_limit_is_where_the_efficiency_is() {
        for is_overlapped in [false, true] {
            let most = model().most_parameters(64, 25.0, 0.9, is_overlapped);
            let kept = |parameters| {
                let step = ScaleModel {
                    parameters,
                    ..model()
                }
                .step(64, 25.0);
                match is_overlapped {
                    true => step.overlapped_efficiency,
                    false => step.efficiency,
                }
            };
            assert!(kept(most) >= 0.9 && kept(most + most / 200) < 0.9, "{most}");
        }
        let hopeless = ScaleModel {
            latency_seconds: 1.0,
            ..model()
        };
        assert_eq!(hopeless.most_parameters(64, 25.0, 0.9, false), 0);
    }
}
