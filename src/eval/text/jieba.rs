//! Chinese word segmentation, word for word that of the Python package jieba.
//!
//! Published scores of Chinese text are counted on the words of Python's `jieba.cut`, so another
//! segmenter, however good, gives other numbers: the ports in Rust cut runs such as `T12-L1` or
//! `2-3` otherwise. This is the default mode (most likely path through the dictionary, a hidden
//! Markov model for what it lacks). The tables are built in and are unpacked at first use;
//! `jieba/README.md` says where they come from.
//!
//! Source: `jieba/__init__.py` (`__cut_DAG`, `calc`, `get_DAG`) and `jieba/finalseg/__init__.py`,
//! jieba 0.42.1.

use std::collections::HashMap;
use std::io::Read;
use std::sync::LazyLock;

use flate2::read::GzDecoder;

/// Probability of the impossible, as the Python code has it: it must stay finite, for two of it are
/// added.
const MIN_LOG: f64 = -3.14e100;

/// States of the Markov model in the order in which Python compares their names, which settles
/// ties.
const B: usize = 0;
const E: usize = 1;
const M: usize = 2;
const S: usize = 3;
/// `START[state]`, natural log.
const START: [f64; 4] = [
    -0.262_686_608_092_500_16,
    MIN_LOG,
    MIN_LOG,
    -1.465_263_339_853_767_8,
];
/// The two states that may come before each state, the lower first.
const PREVIOUS: [[usize; 2]; 4] = [[E, S], [B, M], [B, M], [E, S]];

/// `TRANSITION[from][to]`, natural log.
const TRANSITION: [[f64; 4]; 4] = [
    [
        MIN_LOG,
        -0.510_825_623_765_990,
        -0.916_290_731_874_155,
        MIN_LOG,
    ],
    [
        -0.589_714_973_685_451_3,
        MIN_LOG,
        MIN_LOG,
        -0.808_525_047_466_937,
    ],
    [
        MIN_LOG,
        -0.333_448_568_119_485_14,
        -1.260_362_382_026_822_6,
        MIN_LOG,
    ],
    [
        -0.721_196_565_466_984_1,
        MIN_LOG,
        MIN_LOG,
        -0.665_863_144_879_821_2,
    ],
];

static TABLES: LazyLock<JiebaTables> = LazyLock::new(JiebaTables::built_in);

/// Cuts `text` into words; put together again they are `text`.
///
/// White space comes out as tokens of its own, a character each (a line end of two characters stays
/// whole).
#[must_use]
pub fn cut(text: &str) -> Vec<&str> {
    let tables = &*TABLES;
    let mut words = Vec::with_capacity(text.len() / 4);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let in_block = is_block(first);
        let (run, after) = split_run(rest, |c| is_block(c) == in_block);
        if in_block {
            tables.cut_block(run, &mut words);
        } else {
            cut_other(run, &mut words);
        }
        rest = after;
    }
    words
}

/// What is looked up in the dictionary; everything else is a token a character.
fn is_block(c: char) -> bool {
    is_han(c) || c.is_ascii_alphanumeric() || matches!(c, '+' | '#' | '&' | '.' | '_' | '%' | '-')
}

/// The range the Python code takes for Chinese; later characters of Unicode are not in it.
fn is_han(c: char) -> bool {
    ('\u{4E00}'..='\u{9FD5}').contains(&c)
}

/// The longest start of `text` whose characters all fit, and what is left.
fn split_run(text: &str, fits: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !fits(c)).unwrap_or(text.len()))
}

fn cut_other<'a>(run: &'a str, words: &mut Vec<&'a str>) {
    let mut rest = run;
    while let Some(c) = rest.chars().next() {
        let length = if rest.starts_with("\r\n") {
            2
        } else {
            c.len_utf8()
        };
        words.push(&rest[..length]);
        rest = &rest[length..];
    }
}

/// The dictionary as sorted lines and the emission table of the Markov model.
struct JiebaTables {
    text: String,
    /// Byte range of each word in `text`, sorted by word.
    words: Vec<(u32, u32)>,
    counts: Vec<u32>,
    /// Where in `words` those with a given first character are.
    first: HashMap<char, (usize, usize)>,
    log_total: f64,
    emission: HashMap<char, [f64; 4]>,
}

impl JiebaTables {
    #[expect(
        clippy::expect_used,
        reason = "the tables are part of the program, a test reads them whole"
    )]
    fn built_in() -> Self {
        let unpack = |bytes: &[u8]| {
            let mut text = String::new();
            GzDecoder::new(bytes)
                .read_to_string(&mut text)
                .map(|_| text)
        };
        let text =
            unpack(include_bytes!("jieba/dict.txt.gz")).expect("the built-in dictionary unpacks");
        let model = unpack(include_bytes!("jieba/hmm.txt.gz")).expect("the built-in model unpacks");
        Self::parse(text, &model).expect("the built-in tables are well formed")
    }

    /// `None` for a line that is not of the form `jieba/gen_tables.py` writes.
    fn parse(text: String, model: &str) -> Option<Self> {
        let mut lines = text.split_inclusive('\n');
        let header = lines.next()?;
        let total: f64 = header.trim_end().parse().ok()?;
        let mut words = Vec::with_capacity(350_000);
        let mut counts = Vec::with_capacity(350_000);
        let mut first: HashMap<char, (usize, usize)> = HashMap::new();
        let mut start = header.len();
        for line in lines {
            let (word, count) = line.trim_end().split_once(' ')?;
            let position = words.len();
            first
                .entry(word.chars().next()?)
                .or_insert((position, position))
                .1 = position + 1;
            words.push((
                u32::try_from(start).ok()?,
                u32::try_from(start + word.len()).ok()?,
            ));
            counts.push(count.parse().ok()?);
            start += line.len();
        }
        let mut emission = HashMap::with_capacity(16_384);
        for line in model.lines() {
            let mut fields = line.split(' ');
            let character = fields.next()?.chars().next()?;
            let mut row = [MIN_LOG; 4];
            for log in &mut row {
                let field = fields.next()?;
                if field != "-" {
                    *log = field.parse().ok()?;
                }
            }
            emission.insert(character, row);
        }
        Some(Self {
            text,
            words,
            counts,
            first,
            log_total: total.ln(),
            emission,
        })
    }

    fn word(&self, position: usize) -> &str {
        let (start, end) = self.words[position];
        &self.text[start as usize..end as usize]
    }

    /// Whether `text` is a word of the dictionary.
    fn contains(&self, text: &str) -> bool {
        let Some(&(low, high)) = text.chars().next().and_then(|c| self.first.get(&c)) else {
            return false;
        };
        let at = low
            + self.words[low..high]
                .partition_point(|&(s, e)| &self.text[s as usize..e as usize] < text);
        at < high && self.word(at) == text
    }

    /// Calls `found(end, count)` for each word of the dictionary that starts at byte `start` of
    /// `block`.
    fn words_at(&self, block: &str, start: usize, mut found: impl FnMut(usize, u32)) {
        let tail = &block[start..];
        let mut characters = tail.char_indices().map(|(at, c)| (at + c.len_utf8(), c));
        let Some((mut end, c)) = characters.next() else {
            return;
        };
        let Some(&(mut low, mut high)) = self.first.get(&c) else {
            return;
        };
        loop {
            let prefix = &tail[..end];
            // Sorted, so the word equal to its own prefix comes before the longer ones.
            if self.word(low).len() == end {
                found(start + end, self.counts[low]);
            }
            let Some((next_end, _)) = characters.next() else {
                return;
            };
            let longer = &tail[..next_end];
            debug_assert!(self.word(low).starts_with(prefix));
            let range = &self.words[low..high];
            let text = |&(s, e): &(u32, u32)| &self.text[s as usize..e as usize];
            let from = range.partition_point(|word| text(word) < longer);
            let count = range[from..].partition_point(|word| text(word).starts_with(longer));
            if count == 0 {
                return;
            }
            (low, high) = (low + from, low + from + count);
            end = next_end;
        }
    }

    /// The most likely path; runs of single characters on it go to the Markov model.
    fn cut_block<'a>(&self, block: &'a str, words: &mut Vec<&'a str>) {
        let mut route = vec![(0.0, 0); block.len() + 1];
        for (start, c) in block.char_indices().rev() {
            let mut best: Option<(f64, usize)> = None;
            let mut offer = |end: usize, count: u32| {
                let score = f64::from(count).ln() - self.log_total + route[end].0;
                // Of equal scores Python's `max` over (score, end) takes the later end.
                if best.is_none_or(|(other, _)| score >= other) {
                    best = Some((score, end));
                }
            };
            self.words_at(block, start, &mut offer);
            let alone = start + c.len_utf8();
            route[start] = best.unwrap_or((0.0 - self.log_total + route[alone].0, alone));
        }

        let mut at = 0;
        let mut singles = 0;
        while at < block.len() {
            let end = route[at].1;
            let word = &block[at..end];
            if word.chars().nth(1).is_some() {
                self.cut_singles(&block[singles..at], words);
                words.push(word);
                singles = end;
            }
            at = end;
        }
        self.cut_singles(&block[singles..], words);
    }

    fn cut_singles<'a>(&self, run: &'a str, words: &mut Vec<&'a str>) {
        match run.chars().count() {
            0 => {}
            1 => words.push(run),
            _ if self.contains(run) => words.extend(
                run.char_indices()
                    .map(|(at, c)| &run[at..at + c.len_utf8()]),
            ),
            _ => {
                let mut rest = run;
                while let Some(c) = rest.chars().next() {
                    let han = is_han(c);
                    let (part, after) = split_run(rest, |c| is_han(c) == han);
                    if han {
                        self.cut_unknown(part, words);
                    } else {
                        cut_latin(part, words);
                    }
                    rest = after;
                }
            }
        }
    }

    /// Viterbi over begin, middle, end, single.
    fn cut_unknown<'a>(&self, run: &'a str, words: &mut Vec<&'a str>) {
        let emit = |c: char| self.emission.get(&c).copied().unwrap_or([MIN_LOG; 4]);
        let mut characters = run.chars();
        let Some(first) = characters.next() else {
            return;
        };
        let emission = emit(first);
        let mut score: [f64; 4] = std::array::from_fn(|state| START[state] + emission[state]);
        let mut back: Vec<[usize; 4]> = Vec::with_capacity(run.len() / 3);
        for c in characters {
            let emission = emit(c);
            let mut from = [0; 4];
            let next = std::array::from_fn(|state| {
                let [low, high] = PREVIOUS[state];
                let through = |previous: usize| {
                    score[previous] + TRANSITION[previous][state] + emission[state]
                };
                // Of equal scores the state with the later letter, as in Python's `max` over
                // (score, name).
                from[state] = if through(high) >= through(low) {
                    high
                } else {
                    low
                };
                through(from[state])
            });
            score = next;
            back.push(from);
        }
        let mut state = if score[S] >= score[E] { S } else { E };
        let mut states = vec![state];
        for from in back.iter().rev() {
            state = from[state];
            states.push(state);
        }

        let (mut begin, mut done) = (0, 0);
        for ((at, c), state) in run.char_indices().zip(states.into_iter().rev()) {
            let end = at + c.len_utf8();
            match state {
                B => begin = at,
                E => {
                    words.push(&run[begin..end]);
                    done = end;
                }
                S => {
                    words.push(&run[at..end]);
                    done = end;
                }
                _ => {}
            }
        }
        if done < run.len() {
            words.push(&run[done..]);
        }
    }
}

/// Letters and digits with a decimal part and a per cent sign are one token, what is between them is
/// another.
fn cut_latin<'a>(run: &'a str, words: &mut Vec<&'a str>) {
    let alphanumeric = |c: char| c.is_ascii_alphanumeric();
    let mut rest = run;
    while !rest.is_empty() {
        let (between, tail) = split_run(rest, |c| !alphanumeric(c));
        if !between.is_empty() {
            words.push(between);
        }
        let (name, mut after) = split_run(tail, alphanumeric);
        if name.is_empty() {
            return;
        }
        if let Some(decimals) = after.strip_prefix('.') {
            let (digits, rest) = split_run(decimals, |c| c.is_ascii_digit());
            if !digits.is_empty() {
                after = rest;
            }
        }
        after = after.strip_prefix('%').unwrap_or(after);
        words.push(&tail[..tail.len() - after.len()]);
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_tables_are_whole() {
        assert_eq!(TABLES.words.len(), 349_045);
        assert_eq!(TABLES.emission.len(), 14_632);
        assert_eq!(TABLES.log_total, 60_101_967_f64.ln());
        assert!((1..TABLES.words.len()).all(|at| TABLES.word(at - 1) < TABLES.word(at)));
    }

    #[test]
    fn words_numbers_and_white_space_as_python_cuts_them() {
        assert_eq!(cut("双肺纹理清晰。"), ["双肺", "纹理", "清晰", "。"]);
        assert_eq!(
            cut("T12-L1 1.5%\r\n"),
            ["T12", "-", "L1", " ", "1.5%", "\r\n"]
        );
        assert_eq!(cut("2-3"), ["2", "-", "3"]);
        assert!(cut("").is_empty());
    }

    #[test]
    fn the_words_put_together_are_the_text() {
        for text in [
            "心影大小、形态正常…… CT值约35.5HU?",
            "\n\t 左\u{3000}右",
            "𠀀龥鿿ａ１",
            ".......",
        ] {
            assert_eq!(cut(text).concat(), text);
        }
    }

    #[test]
    fn a_malformed_table_is_refused() {
        assert!(JiebaTables::parse("12\n肺\n".into(), "").is_none());
        assert!(JiebaTables::parse("12\n肺 3\n".into(), "肺 -1 -2\n").is_none());
        assert!(JiebaTables::parse("12\n肺 3\n".into(), "肺 -1 -2 - -3.5\n").is_some());
    }
}
