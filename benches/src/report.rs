//! Tables on the terminal and the same in JSON.

use std::fs;

use kv_tests::place;
use serde_json::{Map, Value, json};

use crate::spread::Spread;

/// What a bench found.
#[derive(Debug)]
pub struct Report {
    name: &'static str,
    tables: Vec<Value>,
    targets: Vec<Value>,
}

/// A table under way.
#[derive(Debug)]
pub struct Table {
    title: String,
    columns: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

/// A cell.
#[derive(Clone, Debug)]
pub enum Cell {
    /// A label.
    Text(String),
    /// A number.
    Number(f64),
    /// A number with its spread.
    Spread(Spread),
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<usize> for Cell {
    fn from(number: usize) -> Self {
        Self::Number(number as f64)
    }
}

impl From<Spread> for Cell {
    fn from(spread: Spread) -> Self {
        Self::Spread(spread)
    }
}

/// A number for people: three significant digits, or all before the point.
#[must_use]
pub fn short(number: f64) -> String {
    match number.abs() {
        n if n >= 100.0 || n.fract() == 0.0 => format!("{number:.0}"),
        n if n >= 10.0 => format!("{number:.1}"),
        n if n >= 0.1 => format!("{number:.2}"),
        _ => format!("{number:.4}"),
    }
}

impl Cell {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => short(*number),
            Self::Spread(s) if s.repeats < 2 => short(s.median),
            Self::Spread(s) => {
                format!(
                    "{} ({}..{})",
                    short(s.median),
                    short(s.least),
                    short(s.most)
                )
            }
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Number(number) => json!(number),
            Self::Spread(spread) => spread.json(),
        }
    }
}

impl Table {
    /// An empty table.
    #[must_use]
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|c| (*c).to_owned()).collect();
        Self {
            title: title.to_owned(),
            columns,
            rows: Vec::new(),
        }
    }

    /// Adds a row with a cell to each column.
    pub fn row(&mut self, cells: Vec<Cell>) {
        assert_eq!(cells.len(), self.columns.len(), "a cell to each column");
        self.rows.push(cells);
    }

    fn print(&self) {
        let texts: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| row.iter().map(Cell::text).collect())
            .collect();
        let width = |i: usize| {
            let cells = texts.iter().map(|row| row[i].len());
            cells.max().unwrap_or(0).max(self.columns[i].len())
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |cells: &[String]| {
            let cells = cells
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        println!("\n{}\n{}", self.title, line(&self.columns));
        println!(
            "{}",
            "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1))
        );
        texts.iter().for_each(|row| println!("{}", line(row)));
    }

    fn json(&self) -> Value {
        let row = |row: &Vec<Cell>| -> Map<String, Value> {
            self.columns
                .iter()
                .cloned()
                .zip(row.iter().map(Cell::json))
                .collect()
        };
        json!({"title": self.title, "rows": self.rows.iter().map(row).collect::<Vec<_>>()})
    }
}

impl Report {
    /// A report named like its bench.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        println!("bench {name}, {cores} cores; numbers are medians (least..most of the repeats)");
        Self {
            name,
            tables: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Prints a table and keeps it.
    pub fn table(&mut self, table: &Table) {
        table.print();
        self.tables.push(table.json());
    }

    /// Notes how a number does against what it is to stay below.
    pub fn at_most(&mut self, what: &str, got: f64, limit: f64, unit: &str) {
        self.target(what, got, limit, unit, got <= limit);
    }

    fn target(&mut self, what: &str, got: f64, limit: f64, unit: &str, met: bool) {
        self.targets.push(json!({
            "what": what, "got": got, "target": limit, "unit": unit, "met": met,
        }));
    }

    /// Prints the targets and writes `target/bench/NAME.json`.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn finish(self) -> anyhow::Result<()> {
        if !self.targets.is_empty() {
            println!("\ntargets");
        }
        for t in &self.targets {
            let number = |key: &str| short(t[key].as_f64().unwrap_or(f64::NAN));
            let word = if t["met"] == true { "met   " } else { "MISSED" };
            let (what, unit) = (
                t["what"].as_str().unwrap_or(""),
                t["unit"].as_str().unwrap_or(""),
            );
            println!(
                "  {word}  {what}: {} {unit}, target {}",
                number("got"),
                number("target")
            );
        }
        let dir = place::root().join("target/bench");
        fs::create_dir_all(&dir)?;
        let file = dir.join(format!("{}.json", self.name));
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let all = json!({
            "bench": self.name, "cores": cores, "tables": self.tables, "targets": self.targets,
        });
        fs::write(&file, serde_json::to_string_pretty(&all)? + "\n")?;
        println!("\nwritten to target/bench/{}.json", self.name);
        Ok(())
    }
}
