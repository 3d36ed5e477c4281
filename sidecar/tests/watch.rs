//! A change of the configuration file is noticed however it is made.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use kv_router::watch::Watch;
use tempfile::TempDir;

async fn is_noticed(watch: &mut Watch) {
    let changed = tokio::time::timeout(Duration::from_secs(20), watch.changed());
    changed.await.expect("in time").expect("watching goes on");
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_written_in_place_or_renamed_over() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("config.yaml");
    write(&file, "a");
    let mut watch = Watch::new(&file).unwrap();
    write(&file, "b");
    is_noticed(&mut watch).await;
    let beside = folder.path().join("beside");
    write(&beside, "c");
    std::fs::rename(&beside, &file).unwrap();
    is_noticed(&mut watch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_config_map_is_swapped_by_its_link() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (version, text) in [("..1", "a"), ("..2", "b"), ("..3", "c")] {
        std::fs::create_dir(at(version)).unwrap();
        write(&at(version).join("config.yaml"), text);
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/config.yaml", at("config.yaml")).unwrap();
    let mut watch = Watch::new(&at("config.yaml")).unwrap();
    for version in ["..2", "..3"] {
        symlink(version, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        is_noticed(&mut watch).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_that_is_broken_off_again_and_again_misses_nothing() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("config.yaml");
    write(&file, "a");
    let mut watch = Watch::new(&file).unwrap();
    write(&file, "b");
    let noticed = async {
        loop {
            tokio::select! {
                changed = watch.changed() => break changed,
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
    };
    let changed = tokio::time::timeout(Duration::from_secs(20), noticed);
    changed.await.expect("in time").expect("watching goes on");
}
