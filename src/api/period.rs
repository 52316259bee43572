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

/// As [`period`], or several of them from the longest unit to the shortest, such as `1d12h`. Hours may be `hr` too.
pub fn periods(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    let mut last = Duration::MAX;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let after = rest.get(digits + 1..)?;
        let unit = period(&format!("1{}", &rest[digits..=digits]))?;
        if unit >= last {
            return None;
        }
        sum = sum.checked_add(period(&rest[..=digits])?)?;
        last = unit;
        rest = if &rest[digits..=digits] == "h" { after.strip_prefix('r').unwrap_or(after) } else { after };
    }
    (!text.is_empty()).then_some(sum)
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

    #[test]
    fn periods_go_from_long_to_short() {
        for (text, seconds) in [("30s", 30), ("1d12h", 129_600), ("1hr30m", 5400), ("1w2d3h4m5s", 788_645)] {
            assert_eq!(periods(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "1", "1h1h", "1m1h", "h", "1ä", "1h ", "-1s", "99999999999999999999s", "s1"] {
            assert_eq!(periods(text), None, "{text}");
        }
    }
}
