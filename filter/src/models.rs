//! The list of models, from the worker table.

use kv_core::table::Table;
use serde_json::{Value, json};

/// The models that the pools name, as `OpenAI`'s `/v1/models` has them; `None` where the first pool
/// takes any, which then is for its workers to say.
#[must_use]
pub fn list(table: &Table) -> Option<String> {
    if table.pools.first()?.models.is_empty() {
        return None;
    }
    let mut data: Vec<Value> = Vec::new();
    for pool in &table.pools {
        let model = |id: &String, parent: Option<&String>| {
            json!({
                "id": id,
                "object": "model",
                "created": 0,
                "owned_by": pool.name,
                "parent": parent,
            })
        };
        data.extend(pool.models.iter().map(|id| model(id, None)));
        let base = pool.models.first();
        data.extend(pool.lora_adapters.iter().map(|id| model(id, base)));
    }
    Some(json!({"object": "list", "data": data}).to_string())
}

#[cfg(test)]
mod tests {
    use super::list;
    use kv_core::table::{Pool, Table};

    #[test]
    fn models_and_adapters_are_listed() {
        let pool = Pool {
            name: "p".into(),
            models: vec!["m".into()],
            lora_adapters: vec!["sql".into()],
            ..Pool::default()
        };
        let table = Table {
            pools: vec![pool],
            ..Table::default()
        };
        let list: serde_json::Value = serde_json::from_str(&list(&table).unwrap()).unwrap();
        assert_eq!(list["data"][0]["id"], "m");
        assert_eq!(list["data"][1]["parent"], "m");
    }

    #[test]
    fn a_pool_that_takes_any_model_names_none() {
        let table = Table {
            pools: vec![Pool::default()],
            ..Table::default()
        };
        assert_eq!(list(&table), None);
        assert_eq!(list(&Table::default()), None);
    }
}
