//! Kernels of CUDA C++: a source and the values that it is compiled with.
//!
//! NVRTC compiles a source the first time a configuration is used; the result is kept in memory and on disk
//! under a key that holds the configuration and a hash of the source.

use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::{LazyLock, Mutex},
};

use sha2::{Digest, Sha256};

use super::compiled;

/// Values a source is compiled with: `#define NAME VALUE`.
pub(super) type Defines = Vec<(&'static str, i64)>;

/// One configuration of a kernel, cheap to make: its source is joined at the first use.
#[derive(Debug, Clone, Eq)]
pub(super) struct Kernel {
    pub(super) name: &'static str,
    sources: &'static [&'static str],
    defines: Defines,
    /// The macro that names the entry point in the sources.
    entry_macro: &'static str,
    threads: u32,
    shared_bytes: usize,
}

impl Kernel {
    /// A kernel of `sources`, whose entry point is called `ENTRY` there.
    pub(super) fn new(
        name: &'static str,
        sources: &'static [&'static str],
        defines: Defines,
        threads: u32,
    ) -> Self {
        Self {
            name,
            sources,
            defines,
            entry_macro: "ENTRY",
            threads,
            shared_bytes: 0,
        }
    }

    /// One more value to compile with.
    pub(super) fn with_define(mut self, name: &'static str, value: i64) -> Self {
        self.defines.push((name, value));
        self
    }

    /// Dynamic shared memory.
    pub(super) fn with_shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// Another name for the entry point in the sources.
    pub(super) fn with_entry_macro(mut self, name: &'static str) -> Self {
        self.entry_macro = name;
        self
    }

    /// Name of the compiled entry point: the kernel's and its configuration's.
    pub(super) fn entry(&self) -> &'static str {
        &self.identity().entry
    }

    /// The key that identifies this configuration, built once.
    pub(super) fn identity(&self) -> &'static Identity {
        static KNOWN: LazyLock<Mutex<HashMap<Kernel, &'static Identity>>> =
            LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(|lock| lock.into_inner());
        if let Some(identity) = known.get(self) {
            return identity;
        }
        let mut entry = self.name.to_string();
        for (_, value) in &self.defines {
            entry.push('_');
            entry.push_str(&value.to_string());
        }
        let mut hasher = Sha256::new();
        hasher.update(self.text(&entry));
        hasher.update(compiled::toolchain());
        let digest = hasher.finalize();
        // One for each configuration of the program; they are used as long as it runs.
        let identity: &'static Identity = Box::leak(Box::new(Identity {
            id: known.len() as u32,
            entry,
            digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }));
        known.insert(self.clone(), identity);
        identity
    }

    /// Threads of a block.
    pub(super) fn threads(&self) -> u32 {
        self.threads
    }

    /// Dynamic shared memory of a block.
    pub(super) fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// The whole text that is compiled.
    pub(super) fn source(&self) -> String {
        self.text(self.entry())
    }

    fn text(&self, entry: &str) -> String {
        let mut text = format!("#define {} {entry}\n", self.entry_macro);
        for (name, value) in &self.defines {
            text.push_str(&format!("#define {name} {value}\n"));
        }
        for source in self.sources {
            text.push_str(source);
            text.push('\n');
        }
        text
    }
}

impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        // Texts of tens of kilobytes are compared only where they are not the same constant.
        (self.name, self.entry_macro) == (other.name, other.entry_macro)
            && (self.threads, self.shared_bytes) == (other.threads, other.shared_bytes)
            && self.defines == other.defines
            && (std::ptr::eq(self.sources, other.sources) || self.sources == other.sources)
    }
}

impl Hash for Kernel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // The sources are compared in `eq` only: every launch hashes.
        (self.name, self.threads, self.shared_bytes).hash(state);
        self.defines.hash(state);
    }
}

/// The key of a kernel's configuration.
#[derive(Debug)]
pub(super) struct Identity {
    /// In this process.
    pub id: u32,
    /// Name of the entry point.
    pub entry: String,
    /// Anywhere: SHA-256 of the text and of the versions of compiler and driver.
    pub digest: String,
}
