//! `keys`: secret keys, encrypted.

use sea_orm::entity::prelude::*;

/// A row.
#[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "keys")]
pub struct Model {
    /// `key_...`
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// The environment it opens.
    pub environment_id: String,
    /// A name for people.
    pub label: String,
    /// Keyed hash of the secret.
    pub lookup: Vec<u8>,
    /// The secret under AEAD.
    pub sealed_secret: Vec<u8>,
    /// First characters of the secret.
    pub hint: String,
    /// A list of words; absent for a root key.
    pub scopes: Option<Json>,
    /// Creation time.
    pub created_at: i64,
    /// When it stops working.
    pub ends_at: Option<i64>,
    /// Whether the operator gave the secret, rather than we made it.
    pub given: bool,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("keys::Model").field("id", &self.id).finish_non_exhaustive()
    }
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
