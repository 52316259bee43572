//! sessiond
fn main() {}
