//! Spans of time as callers write them.

use std::time::Duration;

/// `45s`, `30m`, `12h`, `7d`, `2w`.
pub fn period(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 604_800,
        _ => return None,
    };
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_a_number_and_a_unit() {
        for (text, seconds) in
            [("45s", 45), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)]
        {
            assert_eq!(period(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "d", "7", "7x", "-1d", "+1d", "1.5d", "7ä", "99999999999999999999d"] {
            assert_eq!(period(text), None, "{text}");
        }
    }
}
