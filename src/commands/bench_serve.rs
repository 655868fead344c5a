//! `bench serve`: how a server holds up under many users.

use clap::Args;

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// Address of the server.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7860")]
    pub server: String,
}

/// Runs `bench serve`.
///
/// # Errors
/// When the server cannot be reached.
pub fn run(_args: &BenchServeArgs) -> anyhow::Result<()> {
    anyhow::bail!("later")
}
