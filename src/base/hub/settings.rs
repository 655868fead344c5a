//! What the environment says about hubs, in the variables of `huggingface_hub` and `modelscope`.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::name::{Hub, expand_home, home};

/// A secret that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(pub(super) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One hub, as the environment describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubPlace {
    /// Address, without `/` at its end.
    pub endpoint: String,
    /// The variable that named it; that of the default where none did.
    pub variable: &'static str,
    /// Who asks.
    pub token: Option<Token>,
    /// Folders where its tools keep models; the first is written to.
    pub caches: Vec<PathBuf>,
}

/// Addresses, tokens and limits of both hubs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// The hub of a name without a prefix.
    pub default_hub: Hub,
    /// Hugging Face.
    pub hugging_face: HubPlace,
    /// ModelScope; its caches are the folders that hold `models` and `hub`.
    pub model_scope: HubPlace,
    /// The variable that forbids downloads.
    pub offline: Option<&'static str>,
    /// Longest wait for the next bytes of an answer.
    pub read_timeout: Duration,
    /// Certificates in place of Mozilla's, and the variable that names them.
    pub certificates: Option<(&'static str, PathBuf)>,
}

impl HubSettings {
    /// The settings of this process.
    pub fn from_env() -> Self {
        Self::from_variables(&|name| env::var_os(name))
    }

    /// The settings that `variable` describes; empty variables count as unset.
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let variables = Variables(variable);
        let uses_modelscope = variables.is_on("USE_MODELSCOPE_HUB");
        Self {
            default_hub: match uses_modelscope {
                true => Hub::ModelScope,
                false => Hub::HuggingFace,
            },
            hugging_face: hugging_face(&variables),
            model_scope: model_scope(&variables),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
                .into_iter()
                .find(|name| variables.is_on(name)),
            read_timeout: variables
                .text("HF_HUB_DOWNLOAD_TIMEOUT")
                .and_then(|seconds| seconds.parse().ok())
                .filter(|seconds| *seconds > 0)
                .map_or(Duration::from_secs(30), Duration::from_secs),
            certificates: ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
                .into_iter()
                .find_map(|name| Some((name, variables.path(name)?)))
                .filter(|(_, path)| path.is_file()),
        }
    }

    /// The settings of one hub.
    pub fn of(&self, hub: Hub) -> &HubPlace {
        match hub {
            Hub::HuggingFace => &self.hugging_face,
            Hub::ModelScope => &self.model_scope,
        }
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Variables<'_> {
    fn raw(&self, name: &str) -> Option<OsString> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Option<String> {
        let text = self.raw(name)?.into_string().ok()?.trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.raw(name).map(|value| expand_home(Path::new(&value)))
    }

    /// As `huggingface_hub` reads a switch.
    fn is_on(&self, name: &str) -> bool {
        self.text(name)
            .is_some_and(|text| ["1", "on", "yes", "true"].contains(&text.to_lowercase().as_str()))
    }

    /// `.cache` of the user.
    fn user_cache(&self) -> Option<PathBuf> {
        let home = self.path("HOME").or_else(home);
        home.map(|home| home.join(".cache"))
    }
}

/// Each once, in order.
fn distinct(paths: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut kept = Vec::new();
    for path in paths {
        if !kept.contains(&path) {
            kept.push(path);
        }
    }
    kept
}

fn hugging_face(variables: &Variables<'_>) -> HubPlace {
    let general = variables
        .path("XDG_CACHE_HOME")
        .or_else(|| variables.user_cache());
    let home = variables
        .path("HF_HOME")
        .or_else(|| Some(general?.join("huggingface")));
    // The first two replace the folder below HF_HOME, as in Python; that one is still looked into.
    let caches = [
        variables.path("HF_HUB_CACHE"),
        variables.path("HUGGINGFACE_HUB_CACHE"),
        home.as_ref().map(|home| home.join("hub")),
    ];
    let stored = || {
        let path = variables
            .path("HF_TOKEN_PATH")
            .or_else(|| Some(home.as_ref()?.join("token")))?;
        fs::read_to_string(path).ok()
    };
    let is_silent = variables.is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN");
    let token = variables
        .text("HF_TOKEN")
        .or_else(|| variables.text("HUGGING_FACE_HUB_TOKEN"))
        .or_else(stored)
        .filter(|_| !is_silent);
    HubPlace {
        endpoint: variables.text("HF_ENDPOINT").map_or_else(
            || "https://huggingface.co".into(),
            |text| text.trim_end_matches('/').to_owned(),
        ),
        variable: "HF_ENDPOINT",
        token: token.and_then(|text| clean(&text)),
        caches: distinct(caches.into_iter().flatten()),
    }
}

fn model_scope(variables: &Variables<'_>) -> HubPlace {
    let (variable, endpoint) = ["MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"]
        .into_iter()
        .find_map(|name| Some((name, variables.text(name)?)))
        .unwrap_or(("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn".into()));
    // A bare domain is common in both.
    let endpoint = match endpoint.contains("://") {
        true => endpoint,
        false => format!("https://{endpoint}"),
    };
    let caches = [
        variables.path("MODELSCOPE_CACHE"),
        variables.user_cache().map(|cache| cache.join("modelscope")),
    ];
    HubPlace {
        endpoint: endpoint.trim_end_matches('/').to_owned(),
        variable,
        token: variables
            .text("MODELSCOPE_API_TOKEN")
            .and_then(|text| clean(&text)),
        caches: distinct(caches.into_iter().flatten()),
    }
}

/// A token that can be a header's value.
fn clean(text: &str) -> Option<Token> {
    let text = text.trim();
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| Token(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> HubSettings {
        HubSettings::from_variables(&|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn caches_are_where_python_keeps_them() {
        let found = settings(&[("HOME", "/h")]);
        assert_eq!(
            found.hugging_face.caches,
            [Path::new("/h/.cache/huggingface/hub")]
        );
        assert_eq!(
            found.model_scope.caches,
            [Path::new("/h/.cache/modelscope")]
        );
        let found = settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]);
        assert_eq!(found.hugging_face.caches, [Path::new("/x/huggingface/hub")]);
        let found = settings(&[
            ("HOME", "/h"),
            ("XDG_CACHE_HOME", "/x"),
            ("HF_HOME", "/f"),
            ("MODELSCOPE_CACHE", "/m"),
        ]);
        assert_eq!(found.hugging_face.caches, [Path::new("/f/hub")]);
        assert_eq!(found.model_scope.caches[0], Path::new("/m"));
        let found = settings(&[
            ("HF_HUB_CACHE", "/c"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HOME", "/f"),
        ]);
        assert_eq!(
            found.hugging_face.caches,
            [Path::new("/c"), Path::new("/old"), Path::new("/f/hub")]
        );
    }

    #[test]
    fn addresses_switches_and_tokens_are_read() {
        let found = settings(&[
            ("HF_ENDPOINT", "https://hf-mirror.com/"),
            ("MODELSCOPE_DOMAIN", "modelscope.ai"),
            ("USE_MODELSCOPE_HUB", "True"),
            ("HF_HUB_OFFLINE", "1"),
            ("HF_TOKEN", " hf_secret\n"),
            ("MODELSCOPE_API_TOKEN", "ms-secret"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "3"),
        ]);
        assert_eq!(found.hugging_face.endpoint, "https://hf-mirror.com");
        assert_eq!(found.model_scope.endpoint, "https://modelscope.ai");
        assert_eq!(found.default_hub, Hub::ModelScope);
        assert_eq!(found.offline, Some("HF_HUB_OFFLINE"));
        assert_eq!(found.read_timeout, Duration::from_secs(3));
        assert_eq!(found.hugging_face.token, Some(Token("hf_secret".into())));
        assert!(!format!("{found:?}").contains("secret"));
        let off = settings(&[("USE_MODELSCOPE_HUB", "0"), ("HF_HUB_OFFLINE", "")]);
        assert_eq!((off.default_hub, off.offline), (Hub::HuggingFace, None));
    }

    #[test]
    fn the_token_file_is_read_unless_that_is_switched_off() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| {
            let all: Vec<(&str, &str)> = [("HF_HOME", home)].iter().chain(more).copied().collect();
            settings(&all).hugging_face.token.map(|token| token.0)
        };
        assert_eq!(token(&[]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_TOKEN", "a")]).as_deref(), Some("a"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
    }
}
