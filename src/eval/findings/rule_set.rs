//! Which table of words reads a set of reports: named, a file, or guessed from the texts.

use std::{fmt, fs, ops::Deref, path::Path, sync::LazyLock};

use regex::Regex;

use super::{error::FindingsError, labeler::Labeler};
use crate::{base::files::sha256_bytes, eval::text::TextLanguage};

/// Words of machine translation.
static TRANSLATED: LazyLock<Regex> = LazyLock::new(|| {
    words(
        "X光|X射线|疤痕|心脏[^，。]{0,6}肿大|不透明|空隙|气隙|气腔|食堂疝|无气[症肿]|XXXX|没有(?:看到|发现|观察到|任何|急性|明显|证据)|的证据|的迹象|半膈|心肺疾病|\
         正常限度|纵膈轮廓|心纵膈|心脏大小正常|肺部(?:是|很|看起来)|胸部X光|X光图像|X射线图像|总的来说|这表明|局灶性|\
         在正常范围内。|的大小是|被(?:发现|观察到|看到)",
    )
});

/// Words of hospitals.
static WRITTEN: LazyLock<Regex> = LazyLock::new(|| {
    words(
        "未见明[显确]|双肺纹理|两肺纹理|肋膈角(?:锐利|清晰|变钝|欠)|请结合|结合临床|较前|待[排查]|占位|斑片|所见|印象|两肺|双肺野|\
         心影|膈面|在位|建议.{0,6}复查|考虑|术后|不除外|随诊|随访复查|肺门(?:不大|影)|膈角",
    )
});

fn words(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern, compiled by a test")
}

/// A labeler and where its table comes from.
pub struct RuleSet {
    labeler: Source,
    /// `openi`, `hospital`, `english`, or the path of the file.
    pub name: String,
    /// Whether the texts decided.
    pub guessed: bool,
    /// SHA-256 of the file.
    hash: Option<String>,
}

enum Source {
    BuiltIn(&'static Labeler),
    File(Box<Labeler>),
}

impl fmt::Debug for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RuleSet").field(&self.name).finish()
    }
}

impl Deref for RuleSet {
    type Target = Labeler;

    fn deref(&self) -> &Labeler {
        match &self.labeler {
            Source::BuiltIn(labeler) => labeler,
            Source::File(labeler) => labeler,
        }
    }
}

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuleSetError {
    /// The file cannot be read.
    #[error(
        "cannot read the rules `{name}`; expected `openi`, `hospital`, `english` or the path of a table in TOML"
    )]
    Read {
        /// What was named.
        name: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The table is not right.
    #[error("`{name}`")]
    Table {
        /// The file.
        name: String,
        /// What is wrong.
        #[source]
        cause: FindingsError,
    },
}

impl RuleSet {
    /// The table `name`: `openi` for the machine-translated corpus, `hospital` for reports as hospitals write
    /// them, `english` for English ones, else a file in the form of `src/eval/findings/tables/hospital.toml`.
    ///
    /// # Errors
    /// [`RuleSetError`]: the file cannot be read or is no table.
    pub fn named(name: &str) -> Result<Self, RuleSetError> {
        let mut hash = None;
        let labeler = match name {
            "openi" => Source::BuiltIn(Labeler::openi()),
            "hospital" => Source::BuiltIn(Labeler::hospital()),
            "english" => Source::BuiltIn(Labeler::english()),
            path => {
                let text =
                    fs::read_to_string(Path::new(path)).map_err(|cause| RuleSetError::Read {
                        name: name.to_owned(),
                        cause,
                    })?;
                let labeler = Labeler::from_toml(&text).map_err(|cause| RuleSetError::Table {
                    name: name.to_owned(),
                    cause,
                })?;
                hash = Some(sha256_bytes(text.as_bytes()));
                Source::File(Box::new(labeler))
            }
        };
        Ok(Self {
            labeler,
            name: name.to_owned(),
            guessed: false,
            hash,
        })
    }

    /// The table `english` where most letters are Latin; else the Chinese one whose words are more frequent in `texts`,
    /// that of hospitals where neither is.
    pub fn guess<'t>(texts: impl IntoIterator<Item = &'t str> + Clone) -> Self {
        let (labeler, name) = if TextLanguage::guess(texts.clone()) == TextLanguage::English {
            (Labeler::english(), "english")
        } else {
            let (mut translated, mut written) = (0, 0);
            for text in texts {
                translated += TRANSLATED.find_iter(text).count();
                written += WRITTEN.find_iter(text).count();
            }
            if translated > written {
                (Labeler::openi(), "openi")
            } else {
                (Labeler::hospital(), "hospital")
            }
        };
        Self {
            labeler: Source::BuiltIn(labeler),
            name: name.to_owned(),
            guessed: true,
            hash: None,
        }
    }

    /// [`Self::named`] or, without a name, [`Self::guess`].
    ///
    /// # Errors
    /// As [`Self::named`].
    pub fn choose<'t>(
        name: Option<&str>,
        texts: impl IntoIterator<Item = &'t str> + Clone,
    ) -> Result<Self, RuleSetError> {
        match name {
            Some(name) => Self::named(name),
            None => Ok(Self::guess(texts)),
        }
    }

    /// What distinguishes it from other tables: the name of a built-in one, the hash of a file.
    pub fn identity(&self) -> &str {
        self.hash.as_deref().unwrap_or(&self.name)
    }

    /// The built-in table of an [`Self::identity`]; `None` for that of a file.
    pub fn built_in(identity: &str) -> Option<Self> {
        let names = ["openi", "hospital", "english"];
        let named = names.contains(&identity).then(|| Self::named(identity));
        named.and_then(Result::ok)
    }

    /// A sentence on the table, for people.
    pub fn told(&self) -> String {
        if self.guessed {
            format!(
                "findings are read with the rules `{}`, guessed from the reports; --rules names others",
                self.name
            )
        } else {
            format!("findings are read with the rules `{}`", self.name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_decide() {
        let translated = "X光图像显示没有局灶性的巩固。没有胸腔积液的证据，心脏大小正常。";
        let written = "双肺纹理增多，未见明显实变，双侧肋膈角锐利，请结合临床。";
        assert_eq!(RuleSet::guess([translated]).name, "openi");
        assert_eq!(RuleSet::guess([written]).name, "hospital");
        assert_eq!(RuleSet::guess([]).name, "hospital");
        let english = "Heart size is normal. No pleural effusion.";
        assert_eq!(RuleSet::guess([english]).name, "english");
        assert_ne!(
            RuleSet::guess([english, written, translated]).name,
            "english"
        );
        assert_eq!(RuleSet::guess(["CT：右肺 COPD。"]).name, "hospital");
    }

    #[test]
    fn an_unknown_name_is_an_error() {
        let error = RuleSet::named("hospitol").err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("`hospitol`") && e.contains("hospital")));
    }
}
