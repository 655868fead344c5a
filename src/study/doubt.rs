//! Reasons to look at the studies before the numbers are believed, in English and Chinese.

/// A reason to look at the studies before the numbers are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StudyDoubt {
    /// All reports are of one study.
    One {
        /// How many reports.
        reports: usize,
    },
    /// Names look like views of one study and are counted apart.
    ViewsApart {
        /// Two such names.
        names: [String; 2],
    },
    /// A study has very many reports.
    Many {
        /// The study.
        study: String,
        /// Its reports.
        reports: usize,
    },
    /// Some rows name their study, and some do not.
    Mixed {
        /// Rows that name it.
        named: usize,
        /// All rows.
        rows: usize,
    },
    /// Every row names its study, so the rule given was not used.
    Unused,
}

impl StudyDoubt {
    /// In English.
    pub fn english(&self) -> String {
        let hint = "name the study in a key `study`, or with `--study-key`, `--study-regex` or `--study-from`";
        match self {
            Self::One { reports } => format!(
                "all {reports} reports are of one study: no interval, test or split means anything; if that is wrong, {hint}"
            ),
            Self::ViewsApart { names } => format!(
                "there are as many studies as images, but `{}` and `{}` look like views of one study; if they are, {hint}",
                names[0], names[1]
            ),
            Self::Many { study, reports } => {
                format!(
                    "study `{study}` has {reports} reports, which is many; if that is wrong, {hint}"
                )
            }
            Self::Mixed { named, rows } => format!(
                "{named} of {rows} rows name their study under a key; the studies of the others come from their images"
            ),
            Self::Unused => {
                "every row names its study under a key, so the rule given for studies was not used"
                    .into()
            }
        }
    }

    /// In Chinese.
    pub fn chinese(&self) -> String {
        let hint =
            "请在每行用 `study` 键写明检查，或使用 `--study-key`、`--study-regex`、`--study-from`";
        match self {
            Self::One { reports } => format!(
                "全部 {reports} 份报告属于同一项检查：区间、检验和划分都没有意义；如不正确，{hint}"
            ),
            Self::ViewsApart { names } => format!(
                "检查数与影像数相同，但 `{}` 与 `{}` 像是同一检查的不同视图；如果是，{hint}",
                names[0], names[1]
            ),
            Self::Many { study, reports } => {
                format!("检查 `{study}` 有 {reports} 份报告，数目过多；如不正确，{hint}")
            }
            Self::Mixed { named, rows } => {
                format!("{rows} 行中 {named} 行写明了检查，其余由影像路径推断")
            }
            Self::Unused => "每行都写明了检查，所给的检查规则没有用到".into(),
        }
    }
}
