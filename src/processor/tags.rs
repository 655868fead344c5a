//! The tags in the text of a row: places of pictures, names and boxes of objects, and near misses.
//!
//! A backslash before a tag makes it plain words: `\<image>` is the text `<image>`.
//!
//! Source of the tags: `Template.special_tokens` and `_replace_image_tags`, ms-swift 4.6,
//! `template/base.py`.

use std::sync::LazyLock;

use regex::Regex;

/// What ms-swift writes where an image belongs.
pub const IMAGE_TAG: &str = "<image>";

/// What a piece of a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag<'a> {
    /// Words.
    Words(&'a str),
    /// `<image>`: the place of the next picture.
    Image,
    /// `<img>path</img>`: the place of this picture.
    File(&'a str),
    /// `<ref-object>`: the name of the next object.
    Reference,
    /// `<bbox>`: the next box.
    Box,
    /// Something that was likely meant for a tag, such as `< image >` or `<video>`.
    NearMiss(&'a str),
}

static TAGS: LazyLock<Regex> = LazyLock::new(|| {
    let tags = concat!(
        r"(?P<escape>\\)?(?:",
        // Also as Qwen's tokenizer writes it.
        r"(?P<image><image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>)|(?P<ref><ref-object>)|(?P<box><bbox>)",
        r"|<img>(?P<file>[^<>]+)</img>",
        // Capitals, blanks, slashes, bars, numbers, full-width brackets; HTML's picture.
        r"|(?P<near>[<＜]\s*[/|]?\s*(?i:images?|img|videos?|audios?)[\s_:#-]*\d*\s*[/|]?\s*[>＞]|<img\s[^<>]*>)",
        r")"
    );
    Regex::new(tags).expect("the pattern is a constant that the tests compile")
});

/// Calls `take` with each piece of `text`, in order.
pub(super) fn read<'a>(text: &'a str, mut take: impl FnMut(Tag<'a>)) {
    let words = |from: usize, to: usize, take: &mut dyn FnMut(Tag<'a>)| {
        if from < to {
            take(Tag::Words(&text[from..to]));
        }
    };
    let mut done = 0;
    for found in TAGS.captures_iter(text) {
        let Some(whole) = found.get(0) else { continue };
        words(done, whole.start(), &mut take);
        done = whole.end();
        let name = |name| found.name(name).map(|found| found.as_str());
        if name("escape").is_some() {
            words(whole.start() + 1, whole.end(), &mut take);
        } else if name("image").is_some() {
            take(Tag::Image);
        } else if name("ref").is_some() {
            take(Tag::Reference);
        } else if name("box").is_some() {
            take(Tag::Box);
        } else if let Some(path) = name("file") {
            take(Tag::File(path));
        } else {
            take(Tag::NearMiss(whole.as_str()));
        }
    }
    words(done, text.len(), &mut take);
}

/// `text` with `<image>` in place of each `<img>path</img>`, and the paths.
pub(super) fn files_to_images(text: &str) -> (String, Vec<String>) {
    let mut files = Vec::new();
    let text = TAGS.replace_all(text, |found: &regex::Captures<'_>| {
        match (found.name("escape"), found.name("file")) {
            (None, Some(file)) => {
                files.push(file.as_str().trim().to_owned());
                IMAGE_TAG.to_owned()
            }
            _ => found[0].to_owned(),
        }
    });
    (text.into_owned(), files)
}

/// `text` as it has to be written for its tags to be plain words.
pub(super) fn escaped(text: &str) -> String {
    TAGS.replace_all(text, |found: &regex::Captures<'_>| {
        format!("\\{}", &found[0])
    })
    .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(text: &str) -> Vec<Tag<'_>> {
        let mut tags = Vec::new();
        read(text, |tag| tags.push(tag));
        tags
    }

    #[test]
    fn tags_are_read_in_order() {
        assert_eq!(
            tags("正位<image>侧位<img>a b.png</img>\n<ref-object><bbox>。"),
            [
                Tag::Words("正位"),
                Tag::Image,
                Tag::Words("侧位"),
                Tag::File("a b.png"),
                Tag::Words("\n"),
                Tag::Reference,
                Tag::Box,
                Tag::Words("。")
            ]
        );
        assert_eq!(
            tags("<|vision_start|><|image_pad|><|vision_end|>q"),
            [Tag::Image, Tag::Words("q")]
        );
        assert_eq!(tags(""), []);
        assert_eq!(tags("a < b > c <think>"), [Tag::Words("a < b > c <think>")]);
    }

    #[test]
    fn near_misses_of_a_place_are_seen() {
        for text in [
            "< image >",
            "<Image>",
            "<image/>",
            "＜image＞",
            "<img>",
            "</image>",
            "<|image|>",
            "<images>",
            "<image_1>",
            "<image 2>",
            "<IMG>",
            "<img src=\"a.png\">",
            "<video>",
            "<audio>",
        ] {
            assert_eq!(tags(text), [Tag::NearMiss(text)]);
        }
        for text in ["<imagery>", "<|image_pad|>", "<think>", "图像<5 cm>", "<im"] {
            assert_eq!(tags(text), [Tag::Words(text)]);
        }
    }

    #[test]
    fn a_backslash_makes_a_tag_plain_words() {
        for tag in [
            "<image>",
            "<bbox>",
            "<ref-object>",
            "< Image >",
            "<img>a</img>",
            "<|vision_start|><|image_pad|><|vision_end|>",
        ] {
            assert_eq!(tags(&format!("\\{tag}")), [Tag::Words(tag)]);
        }
        assert_eq!(
            tags("见\\<image>的<image>"),
            [
                Tag::Words("见"),
                Tag::Words("<image>"),
                Tag::Words("的"),
                Tag::Image
            ]
        );
        let words = "见<image>、\\<bbox>与<think>";
        assert_eq!(escaped(words), "见\\<image>、\\\\<bbox>与<think>");
        let (text, files) = files_to_images("<img>a.png</img>\\<img>b</img><image>");
        assert_eq!(text, "<image>\\<img>b</img><image>");
        assert_eq!(files, ["a.png"]);
    }
}
