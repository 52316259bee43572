//! A strict walk over JSON text (RFC 8259) that says where things stand and builds nothing: what a snapshot holds is
//! a stranger's, and a value built from it can take twenty times its room.
//!
//! Takes time linear in the text, and a bit of memory for each level of nesting.

use std::borrow::Cow;
use std::ops::Range;

/// What `read` makes of the one value that `text` is. `None` if it makes nothing of it, or `text` is more or less than that.
pub(super) fn whole<'a, T>(text: &'a [u8], read: impl FnOnce(&mut Walk<'a>) -> Option<T>) -> Option<T> {
    std::str::from_utf8(text).ok()?;
    let mut walk = Walk { text, at: 0, open: Vec::new(), depth: 0 };
    walk.space();
    let made = read(&mut walk)?;
    walk.space();
    (walk.at == text.len()).then_some(made)
}

/// Whether a key, quotes included, means `name`.
pub(super) fn is_named(key: &[u8], name: &str) -> bool {
    let bare = &key[1..key.len() - 1];
    bare == name.as_bytes()
        || bare.contains(&b'\\') && string(key, 2 + 6 * name.len()).is_some_and(|meant| meant == name)
}

/// What a string means whose text, quotes included, is at most `max` bytes; `None` for any other value.
pub(super) fn string(text: &[u8], max: usize) -> Option<Cow<'_, str>> {
    let inner = text.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if text.len() > max {
        return None;
    }
    if inner.contains(&b'\\') {
        return serde_json::from_slice(text).ok().map(Cow::Owned);
    }
    std::str::from_utf8(inner).ok().map(Cow::Borrowed)
}

/// A place in a text. Each step takes one value, or a part of one, and stops behind it; `None` is the end of the walk.
pub(super) struct Walk<'a> {
    text: &'a [u8],
    at: usize,
    /// A bit for each open bracket of the value that is skipped, the innermost last: set for an object.
    open: Vec<u64>,
    depth: usize,
}

impl<'a> Walk<'a> {
    /// Takes an object. `each` is shown every key, quotes included, and takes the value. A key may come twice.
    pub(super) fn members(&mut self, mut each: impl FnMut(&mut Self, &'a [u8]) -> Option<()>) -> Option<()> {
        self.open(b'{')?;
        if self.eat(b'}') {
            return Some(());
        }
        loop {
            let key = self.key()?;
            self.space();
            each(self, &self.text[key])?;
            if !self.goes_on(b'}')? {
                return Some(());
            }
        }
    }

    /// Takes an array. `each` takes every element.
    pub(super) fn elements(&mut self, mut each: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.open(b'[')?;
        if self.eat(b']') {
            return Some(());
        }
        loop {
            each(self)?;
            if !self.goes_on(b']')? {
                return Some(());
            }
        }
    }

    /// Takes a value, and says where it stands.
    #[inline]
    pub(super) fn value(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        // A long list is mostly one of numbers and texts.
        match self.peek()? {
            b'{' | b'[' => self.skip()?,
            first => self.scalar(first)?,
        }
        Some(start..self.at)
    }

    /// Takes an object, and says where the values stand that these keys have in it; the last one of each counts.
    pub(super) fn find<const N: usize>(&mut self, names: [&str; N]) -> Option<[Option<Range<usize>>; N]> {
        let mut found = [const { None }; N];
        self.members(|walk, key| {
            let place = walk.value()?;
            if let Some(at) = names.iter().position(|name| is_named(key, name)) {
                found[at] = Some(place);
            }
            Some(())
        })?;
        Some(found)
    }

    /// Where the next step begins.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Whether the next value is an object.
    #[inline]
    pub(super) fn is_at_object(&self) -> bool {
        self.peek() == Some(b'{')
    }

    /// Goes back or on to a place in the text.
    pub(super) fn go(&mut self, at: usize) {
        self.at = at;
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    #[inline]
    fn eat(&mut self, byte: u8) -> bool {
        let eaten = self.peek() == Some(byte);
        self.at += usize::from(eaten);
        eaten
    }

    #[inline]
    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// A bracket, and the space behind it.
    fn open(&mut self, bracket: u8) -> Option<()> {
        let opened = self.eat(bracket);
        self.space();
        opened.then_some(())
    }

    /// Behind a value within a bracket: whether another one, or a key, follows, and then up to it.
    #[inline]
    fn goes_on(&mut self, close: u8) -> Option<bool> {
        self.space();
        if self.eat(b',') {
            self.space();
            return Some(true);
        }
        self.eat(close).then_some(false)
    }

    fn skip(&mut self) -> Option<()> {
        loop {
            match self.peek()? {
                b'{' => {
                    self.open(b'{')?;
                    if !self.eat(b'}') {
                        self.push(true);
                        self.key()?;
                        self.space();
                        continue;
                    }
                }
                b'[' => {
                    self.open(b'[')?;
                    if !self.eat(b']') {
                        self.push(false);
                        continue;
                    }
                }
                first => self.scalar(first)?,
            }
            if !self.close()? {
                return Some(());
            }
        }
    }

    /// A value without others in it, which begins with this byte.
    #[inline]
    fn scalar(&mut self, first: u8) -> Option<()> {
        match first {
            b'-' | b'0'..=b'9' => self.number(),
            b'"' => self.string(),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => None,
        }
    }

    /// Closes every bracket that ends behind a value; whether another value follows within the one at hand.
    fn close(&mut self) -> Option<bool> {
        while self.depth > 0 {
            let is_object = self.is_object();
            if self.goes_on(if is_object { b'}' } else { b']' })? {
                if is_object {
                    self.key()?;
                    self.space();
                }
                return Some(true);
            }
            self.depth -= 1;
        }
        Some(false)
    }

    fn push(&mut self, is_object: bool) {
        let (word, bit) = (self.depth / 64, self.depth % 64);
        if word == self.open.len() {
            self.open.push(0);
        }
        self.open[word] = (self.open[word] & !(1 << bit)) | (u64::from(is_object) << bit);
        self.depth += 1;
    }

    fn is_object(&self) -> bool {
        let innermost = self.depth - 1;
        (self.open[innermost / 64] >> (innermost % 64)) & 1 == 1
    }

    /// A key and the colon behind it; the place of the key.
    fn key(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        self.string()?;
        let end = self.at;
        self.space();
        self.eat(b':').then_some(start..end)
    }

    fn string(&mut self) -> Option<()> {
        if !self.eat(b'"') {
            return None;
        }
        loop {
            let plain =
                self.text[self.at..].iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))?;
            self.at += plain + 1;
            match self.text[self.at - 1] {
                b'"' => return Some(()),
                b'\\' => self.escape()?,
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        let kind = self.peek()?;
        self.at += 1;
        match kind {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(()),
            b'u' => {
                let digits = self.text.get(self.at..self.at + 4)?;
                self.at += 4;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(())
            }
            _ => None,
        }
    }

    #[inline]
    fn number(&mut self) -> Option<()> {
        self.eat(b'-');
        if !self.eat(b'0') {
            self.digits()?;
        }
        // Mostly neither follows.
        if !matches!(self.peek(), Some(b'.' | b'e' | b'E')) {
            return Some(());
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            let _sign = self.eat(b'+') || self.eat(b'-');
            self.digits()?;
        }
        Some(())
    }

    /// At least one.
    #[inline]
    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        let found = self.text[self.at..].starts_with(word);
        self.at += word.len();
        found.then_some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    fn is_json(text: &str) -> bool {
        whole(text.as_bytes(), Walk::value).is_some()
    }

    fn places(text: &str) -> Option<Vec<&str>> {
        let mut found = Vec::new();
        whole(text.as_bytes(), |walk| {
            walk.elements(|walk| {
                found.push(&text[walk.value()?]);
                Some(())
            })
        })
        .map(|()| found)
    }

    fn members(text: &str) -> Option<Vec<(&str, &str)>> {
        let mut found = Vec::new();
        whole(text.as_bytes(), |walk| {
            walk.members(|walk, key| {
                found.push((std::str::from_utf8(key).expect("UTF-8"), &text[walk.value()?]));
                Some(())
            })
        })
        .map(|()| found)
    }

    #[test]
    fn elements_and_members_are_found_where_they_stand() {
        assert_eq!(
            places(" [ 1 ,\"a,]\\\"\", {\"a\" : [ ] } ,[[{}]], null ] "),
            Some(vec!["1", "\"a,]\\\"\"", "{\"a\" : [ ] }", "[[{}]]", "null"])
        );
        assert_eq!(places("[]"), Some(vec![]));
        for text in ["", "[", "[1", "[1,]", "[,1]", "[1 2]", "[] []", "{}", "[{\"a\":1]}", "[[1}]", "1"] {
            assert_eq!(places(text), None, "{text}");
        }
        assert_eq!(
            members(r#" {"a": 1, "b" :{"a":2},"a":"x"} "#),
            Some(vec![("\"a\"", "1"), ("\"b\"", "{\"a\":2}"), ("\"a\"", "\"x\"")])
        );
        for text in ["", "[]", "{", "{a:1}", "{\"a\"}", "{\"a\":1,}", "{\"a\":1} x", "{1:1}"] {
            assert_eq!(members(text), None, "{text}");
        }
        let found = whole(br#"{"a":1,"\u0062":2,"a":3,"c":4}"#, |walk| walk.find(["b", "a", "d"]));
        assert_eq!(found, Some([Some(16..17), Some(22..23), None]));
        assert_eq!(whole(&[b'"', 0xff, b'"'], Walk::value), None, "no UTF-8");
    }

    #[test]
    fn a_string_is_decoded_within_its_limit() {
        assert_eq!(string(br#""abc""#, 5).as_deref(), Some("abc"));
        assert_eq!(string(br#""\u0061\n""#, 99).as_deref(), Some("a\n"));
        for (text, max) in [(r#""abc""#, 4), ("1", 9), ("\"", 9), (r#""\ud800""#, 9)] {
            assert_eq!(string(text.as_bytes(), max), None, "{text}");
        }
    }

    #[test]
    fn nesting_is_followed_as_deep_as_it_goes() {
        let deep = format!("{}1{}", "[{\"a\":".repeat(100_000), "}]".repeat(100_000));
        assert!(is_json(&deep));
        assert!(!is_json(&deep[..deep.len() - 1]));
        assert!(!is_json(&deep.replacen("}]", "]}", 1)));
    }

    proptest! {
        #[test]
        fn what_is_json_is_what_serde_takes_for_json(text in r#"[\[\]{},:"0-3.eE+\-\\u anutrfls\n\t\PC]{0,24}"#) {
            prop_assert_eq!(is_json(&text), serde_json::from_str::<IgnoredAny>(&text).is_ok());
        }

        #[test]
        fn json_with_a_fault_is_what_serde_takes_for_one(at in 0usize..200, byte in 0x20u8..0x7f) {
            let mut text = String::from(
                r#"{"id":"a\u0041\"","n":[-0.5e+3,0,12E1,null,true,false,{}],"o":{"":[[],{"k":"é"}]} ,"z":1}"#,
            ).into_bytes();
            let at = at % text.len();
            if text[at].is_ascii() {
                text[at] = byte;
            }
            let text = String::from_utf8(text).expect("UTF-8");
            prop_assert_eq!(is_json(&text), serde_json::from_str::<IgnoredAny>(&text).is_ok());
        }
    }
}
