//! Writes the genuine messages below a folder of fixtures where `cargo fuzz` looks for what each
//! target begins with: `seeds FIXTURES CORPUS`.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(fixtures), Some(corpus)) = (arguments.next(), arguments.next()) else {
        eprintln!("seeds FIXTURES CORPUS");
        std::process::exit(2);
    };
    let messages = kv_fuzz::corpus(&fixtures)?;
    for target in kv_fuzz::TARGETS {
        let folder = corpus.join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (i, message) in messages.iter().enumerate() {
            std::fs::write(
                folder.join(format!("genuine-{i:03}")),
                (target.wrap)(message),
            )?;
        }
    }
    println!(
        "{} messages for each of {} targets",
        messages.len(),
        kv_fuzz::TARGETS.len()
    );
    Ok(())
}
