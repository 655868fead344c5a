//! What this program was built from, and for what.

/// Version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Commit of the sources, with `-dirty` where they differ from it; `unknown` without a history.
pub const COMMIT: &str = env!("XRAY_COMMIT");

/// Target triple.
pub const TARGET: &str = env!("XRAY_TARGET");

/// Cargo's profile: `release` or `debug`.
pub const PROFILE: &str = env!("XRAY_PROFILE");

/// Version and commit in a line; features, devices and target below it.
pub const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("XRAY_COMMIT"),
    ")\nfeatures: ",
    env!("XRAY_FEATURES"),
    "\ndevices: ",
    env!("XRAY_DEVICES"),
    "\ntarget: ",
    env!("XRAY_TARGET"),
    ", ",
    env!("XRAY_PROFILE"),
);

/// Features of Cargo.toml that are built in.
pub fn features() -> Vec<&'static str> {
    env!("XRAY_FEATURES").split_whitespace().collect()
}
