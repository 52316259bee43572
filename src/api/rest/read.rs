//! Reads typed fields out of a JSON object and collects everything that has the wrong type.

use serde_json::{Map, Value};

use crate::api::error::Failure;
use crate::domain::{Timestamp, Violation};

/// A JSON object being read.
pub struct Reader<'a> {
    object: &'a Map<String, Value>,
    prefix: &'static str,
    faults: Vec<Violation>,
}

impl<'a> Reader<'a> {
    /// A reader whose fields are reported as `prefix` + name.
    pub fn new(object: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self { object, prefix, faults: Vec::new() }
    }

    /// The field, unless it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// True if the field is there, be it null.
    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// Notes a wrong type.
    pub fn expected(&mut self, name: &str, what: &str) {
        let field = format!("{}{name}", self.prefix);
        self.faults.push(Violation { field, message: format!("expected {what}") });
    }

    /// Reads a field with `read`, noting a fault if it has another type.
    pub fn field<T>(&mut self, name: &str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.get(name)?;
        let read = read(value);
        if read.is_none() {
            self.expected(name, what);
        }
        read
    }

    /// A string.
    pub fn text(&mut self, name: &str) -> Option<String> {
        self.field(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A string that must be there.
    pub fn required_text(&mut self, name: &str) -> String {
        if self.get(name).is_none() {
            self.expected(name, "a string");
        }
        self.text(name).unwrap_or_default()
    }

    /// An array of strings.
    pub fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        self.field(name, "an array of strings", |value| {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        })
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Option<Map<String, Value>> {
        self.field(name, "an object", |value| value.as_object().cloned())
    }

    /// A date, as JavaScript's `new Date()` takes it: text or milliseconds.
    pub fn date(&mut self, name: &str) -> Option<Timestamp> {
        self.field(name, "a date", |value| match value {
            Value::String(text) => Timestamp::parse(text),
            Value::Number(number) => millis(number.as_f64()?),
            _ => None,
        })
    }

    /// Everything that was wrong.
    pub fn faults(self) -> Vec<Violation> {
        self.faults
    }

    /// Refuses if anything was wrong.
    pub fn finish(self) -> Result<(), Failure> {
        if self.faults.is_empty() { Ok(()) } else { Err(Failure::types(&self.faults)) }
    }
}

/// Milliseconds within the range of a JavaScript date.
fn millis(number: f64) -> Option<Timestamp> {
    const JS_DATE_MAX: f64 = 8.64e15;
    (number.abs() <= JS_DATE_MAX).then(|| Timestamp::from_millis(number as i64))
}
