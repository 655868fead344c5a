//! Text as the tables expect it: half-width, simplified; sentences of it.

use std::{borrow::Cow, collections::BTreeMap, ops::Range, sync::LazyLock};

use regex::Regex;

use super::{
    error::FindingsError,
    syntax::{Spelling, TableSyntax},
};

/// Traditional characters of radiology reports, each before its simplified form.
const TRADITIONAL: &str = "腫肿塊块結结節节氣气積积縱纵縮缩擴扩張张側侧雙双兩两號号見见異异現现顯显變变邊边緣缘陰阴癥症狀状實实質质間间網网條条線线點点鈣钙陳陈舊旧惡恶轉转術术後后導导監监護护儀仪釘钉鋼钢鉗钳絲丝夾夹內内體体動动\
    脈脉彎弯關关癒愈閉闭損损壞坏斷断開开頭头頸颈脅胁鎖锁鎮镇無无與与為为於于從从這这個个們们會会來来對对時时說说還还沒没過过進进遠远處处僅仅發发診诊檢检觀观圖图顆颗葉叶紋纹亂乱強强減减輕轻嚴严應应該该給给\
    複复復复療疗藥药論论較较稱称數数據据寬宽長长緊紧鬆松圓圆銳锐鈍钝滲渗潤润濃浓淺浅濕湿癆痨纖纤維维壓压擠挤徵征幾几腦脑膽胆腎肾臟脏腸肠門门靜静傷伤創创傾倾隨随訪访臨临牀床醫医師师請请議议鏡镜鑑鉴別别難难\
    確确認认證证懷怀慮虑團团狹狭類类遺遗餘余滿满佔占約约層层彌弥黏粘連连纍累壺壶廣广闊阔橫横達达環环雲云霧雾樣样顏颜齊齐勻匀規规則则當当歲岁婦妇產产嬰婴兒儿齡龄報报瀰弥適适區区盤盘裝装製制屬属鄰邻漸渐遲迟殘残漿浆\
    電电蹤踪衛卫繞绕簡简輪轮軟软組组織织輸输針针鈦钛銀银極极圍围擬拟懸悬絡络純纯級级細细終终統统綜综縫缝總总繼继續续職职聯联脫脱膠胶膚肤蓋盖衝冲補补裡里裏里計计調调識识貫贯貼贴資资軸轴載载輔辅選选釐厘陽阳隱隐雜杂離离響响頂顶順顺預预額额風风飽饱驗验竇窦膿脓瘍疡瘺瘘\
    皺皱盡尽穩稳納纳綠绿聲声脹胀臥卧舉举虛虚蟲虫觸触記记許许評评詳详誤误諸诸豐丰負负賁贲贅赘趨趋軀躯輻辐迴回週周遊游運运釋释錯错陣阵險险項项頻频題题飛飞魚鱼黃黄鬱郁嚢囊佈布併并倂并偽伪償偿優优價价凈净淨净劃划劑剂勞劳勢势協协卻却厲厉參参員员啓启喚唤嗎吗嗆呛園园國国\
    執执塗涂墊垫壩坝夠够奪夺孫孙學学寧宁審审尋寻專专將将屆届島岛峽峡嶄崭帶带幹干廢废廳厅彈弹徑径態态慣惯戰战戶户掃扫揚扬換换搖摇搶抢摺折撐撑撥拨擇择攝摄攜携敗败敘叙斂敛晝昼曆历東东桿杆梔栀棄弃棗枣構构槍枪標标樞枢橋桥機机櫃柜權权歐欧歸归殼壳毀毁氫氢決决況况淚泪測测\
    渾浑湯汤準准溝沟溫温滯滞滾滚漲涨潛潜澀涩灣湾災灾煙烟熱热燒烧營营爭争牽牵犧牺獲获瑣琐畫画痙痉瘋疯癱瘫癢痒盜盗盧卢眾众碼码礙碍禮礼稟禀種种窩窝窮穷競竞筆笔範范築筑篩筛籠笼粵粤糞粪紀纪紙纸絕绝綁绑緩缓緻致縣县繫系罰罚羣群義义習习聖圣聽听肅肃膩腻臉脸興兴舖铺艱艰藝艺\
    蘇苏虧亏蝕蚀衆众親亲訊讯討讨訓训訴诉詢询試试話话誌志誰谁課课諒谅談谈譯译讀读讓让豎竖貧贫責责貴贵費费賴赖贏赢趕赶跡迹踐践躍跃車车輛辆辦办辭辞農农遞递遷迁邁迈鄉乡鄭郑醬酱鉀钾銷销鋒锋鋪铺錄录錐锥錶表鍊链鎳镍鐵铁鑄铸閃闪閏闰閒闲閱阅闌阑隊队階阶際际隻只雛雏靈灵頁页\
    須须頗颇領领頰颊顎颚顫颤顱颅飄飘餅饼養养駕驾騎骑驅驱驚惊骯肮髮发鬚须鮮鲜鹼碱麥麦黨党齒齿";

/// The block of the common characters.
const CHARACTERS: Range<u32> = 0x4E00..0xA000;

/// Simplified form of each of [`CHARACTERS`], in their order: one look-up a character, where a map would hash each.
static SIMPLIFIED: LazyLock<Vec<char>> = LazyLock::new(|| {
    let mut forms: Vec<char> = CHARACTERS.filter_map(char::from_u32).collect();
    let letters: Vec<char> = TRADITIONAL.chars().filter(|c| !c.is_whitespace()).collect();
    for pair in letters.chunks_exact(2) {
        if let Some(form) =
            forms.get_mut((u32::from(pair[0]).wrapping_sub(CHARACTERS.start)) as usize)
        {
            *form = pair[1];
        }
    }
    forms
});

/// Misspelt words of a table, each with the word that is meant, which has as many bytes: places in a text stay what
/// they are.
pub(super) struct WordSpelling {
    wrong: Regex,
    meant: BTreeMap<String, String>,
}

impl WordSpelling {
    /// `None` for a table without misspelt words.
    ///
    /// # Errors
    /// [`FindingsError::Spelling`] for a pair of different length.
    pub(super) fn of(words: &BTreeMap<String, String>) -> Result<Option<Self>, FindingsError> {
        if words.is_empty() {
            return Ok(None);
        }
        let unequal = words
            .iter()
            .find(|(wrong, meant)| wrong.is_empty() || wrong.len() != meant.len());
        if let Some((wrong, meant)) = unequal {
            return Err(FindingsError::Spelling {
                wrong: wrong.clone(),
                meant: meant.clone(),
            });
        }
        // At one place the longest word wins.
        let mut patterns: Vec<String> = words.keys().map(|word| regex::escape(word)).collect();
        patterns.sort_by_key(|word| std::cmp::Reverse(word.len()));
        let wrong = Spelling::CHARACTERS.compile(&patterns.join("|"), "`spelling`")?;
        Ok(Some(Self {
            wrong,
            meant: words.clone(),
        }))
    }

    fn apply<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.wrong.replace_all(text, |found: &regex::Captures| {
            self.meant[&found[0]].clone()
        })
    }
}

/// A text in the form of the tables, with the way back to the bytes of the original.
pub(super) struct Normalised<'t> {
    /// The text to read.
    pub(super) text: Cow<'t, str>,
    /// Byte of the original for each byte of the text, and one for the end; empty if they are equal.
    origin: Vec<usize>,
}

impl<'t> Normalised<'t> {
    /// Full-width letters and digits become half-width, traditional characters simplified, and words as `spelling`
    /// has them.
    pub(super) fn of(text: &'t str, spelling: Option<&WordSpelling>) -> Self {
        let mut normalised = Self::of_letters(text);
        if let Some(spelling) = spelling
            && let Cow::Owned(meant) = spelling.apply(&normalised.text)
        {
            normalised.text = Cow::Owned(meant);
        }
        normalised
    }

    fn of_letters(text: &'t str) -> Self {
        if !text.chars().any(|c| normal(c) != c) {
            return Self {
                text: Cow::Borrowed(text),
                origin: Vec::new(),
            };
        }
        let mut normalised = String::with_capacity(text.len());
        let mut origin = Vec::with_capacity(text.len() + 1);
        for (at, c) in text.char_indices() {
            let c = normal(c);
            origin.extend(std::iter::repeat_n(at, c.len_utf8()));
            normalised.push(c);
        }
        origin.push(text.len());
        Self {
            text: Cow::Owned(normalised),
            origin,
        }
    }

    /// Bytes of the original.
    pub(super) fn original(&self, range: Range<usize>) -> Range<usize> {
        let at = |byte: usize| self.origin.get(byte).copied().unwrap_or(byte);
        at(range.start)..at(range.end)
    }
}

fn normal(c: char) -> char {
    match c {
        '０'..='９'
        | 'Ａ'..='Ｚ'
        | 'ａ'..='ｚ'
        | '％'
        | '．'
        | '＋'
        | '－'
        | '＜'
        | '＞'
        | '／' => char::from_u32(u32::from(c) - 0xFEE0).unwrap_or(c),
        '\u{3000}' => ' ',
        c => {
            let place = u32::from(c).checked_sub(CHARACTERS.start);
            let form = place.and_then(|place| SIMPLIFIED.get(place as usize));
            form.copied().unwrap_or(c)
        }
    }
}

/// Byte ranges of the sentences, end marks included. A number that begins the next item of a list begins a sentence.
pub(super) fn sentences(report: &str, syntax: &TableSyntax) -> Vec<Range<usize>> {
    let marks = report
        .match_indices(['。', '；', '！', '？', '?', '!', ';', '\n'])
        .map(|(at, mark)| at + mark.len());
    let mut ends: Vec<usize> = marks.chain(items(report)).collect();
    if let Some(abbreviation) = &syntax.abbreviation {
        // The full stop of 1.5 and of e.g. ends nothing.
        let stops = report.match_indices('.').filter(|(at, _)| {
            let after = report[at + 1..].chars().next();
            after.is_none_or(|c| c.is_whitespace() || c == ')' || c.is_ascii_uppercase())
                && !abbreviation.is_match(&last_word(&report[..*at]).to_ascii_lowercase())
        });
        ends.extend(stops.map(|(at, _)| at + 1));
    }
    ends.push(report.len());
    ends.sort_unstable();
    ends.dedup();
    let mut start = 0;
    let mut ranges = Vec::with_capacity(ends.len());
    for end in ends {
        if end > start {
            ranges.push(start..end);
            start = end;
        }
    }
    ranges
}

fn last_word(text: &str) -> &str {
    text.rsplit(char::is_whitespace).next().unwrap_or_default()
}

/// Where the items of a numbered list begin: `1.`, `2、` … in turn.
fn items(report: &str) -> Vec<usize> {
    let mut next = 1;
    let (mut starts, mut circled) = (Vec::new(), Vec::new());
    let chars: Vec<(usize, char)> = report.char_indices().collect();
    let letter = |n: usize| chars.get(n).map(|(_, c)| *c);
    for (n, &(at, c)) in chars.iter().enumerate() {
        if ('①'..='⑳').contains(&c) {
            circled.push(at);
        }
        if char::from_digit(next, 10) != Some(c) {
            continue;
        }
        let before = n.checked_sub(1).and_then(letter);
        let after = letter(n + 2);
        let mark = letter(n + 1);
        // 3.5 is a number; 第5、第6 and 胸5、胸6 are counted bones.
        let is_item = match mark {
            Some('.' | ')' | '）') => {
                before.is_none_or(|b| !b.is_ascii_alphanumeric() && b != '.')
            }
            Some('、') => before.is_none_or(|b| !b.is_alphanumeric()),
            _ => false,
        };
        if is_item && after.is_some_and(|after| !after.is_ascii_digit()) {
            starts.push(at);
            next += 1;
        }
    }
    // A single number is no list.
    if starts.len() >= 2 {
        circled.extend(starts);
    }
    circled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        sentences(text, &TableSyntax::of(None).expect("the Chinese words"))
            .into_iter()
            .map(|range| &text[range])
            .collect()
    }

    #[test]
    fn numbered_items_are_sentences_without_full_stops() {
        assert_eq!(
            cut("印象：1.右肺炎症 2.心影增大 3.主动脉迂曲"),
            ["印象：", "1.右肺炎症 ", "2.心影增大 ", "3.主动脉迂曲"]
        );
        assert_eq!(
            cut("1、肺炎，直径1.5cm2、气胸").len(),
            1,
            "a letter before the number"
        );
        assert_eq!(cut("第1、2肋骨折，心胸比0.52。").len(), 1);
    }

    #[test]
    fn a_misspelt_word_is_read_as_the_word_meant_and_keeps_its_bytes() {
        let words = [("气凶", "气胸"), ("节结构", "节结构"), ("节结", "结节")];
        let words = words.map(|(wrong, meant)| (wrong.to_owned(), meant.to_owned()));
        let spelling = WordSpelling::of(&words.into()).ok().flatten();
        let text = "右側气凶，节结，关节结构可。";
        let read = Normalised::of(text, spelling.as_ref());
        assert_eq!(read.text, "右侧气胸，结节，关节结构可。");
        let at = read.text.find("气胸").unwrap_or_default();
        assert_eq!(&text[read.original(at..at + "气胸".len())], "气凶");
        let unequal = [("气", "气胸")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let error = WordSpelling::of(&unequal.into()).err();
        assert!(error.is_some_and(|error| error.to_string().contains("`气胸`")));
    }

    #[test]
    fn traditional_and_full_width_text_keeps_its_bytes() {
        let text = "ＣＴ：右側氣胸，約３０％。";
        let normal = Normalised::of(text, None);
        assert_eq!(normal.text, "CT：右侧气胸，约30%。");
        let at = normal.text.find("气胸").unwrap_or_default();
        assert_eq!(&text[normal.original(at..at + "气胸".len())], "氣胸");
        assert!(matches!(
            Normalised::of("右侧气胸", None).text,
            Cow::Borrowed(_)
        ));
    }
}
