//! Random numbers that are the same in every run.

/// A generator (xorshift).
pub struct Dice(u64);

impl Dice {
    /// One that begins with `seed`, which must not be 0.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `sides`.
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).expect("fits")
    }

    /// True once in so many times.
    pub fn one_in(&mut self, sides: usize) -> bool {
        self.roll(sides) == 0
    }

    /// About a third of the choices.
    pub fn some_of(&mut self, choices: &[&str]) -> Vec<String> {
        choices.iter().filter(|_| self.one_in(3)).map(|&word| word.to_owned()).collect()
    }
}
