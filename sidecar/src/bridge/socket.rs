//! The Unix socket's file.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Why a socket can't be bound.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers on it.
    #[error("{}: another process listens on this socket", .0.display())]
    Taken(PathBuf),
    /// A file is in the way that isn't a socket.
    #[error("{}: exists and is no socket", .0.display())]
    NoSocket(PathBuf),
    /// The system refuses.
    #[error("{}: {error}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
}

/// Binds a socket that only its owner may use. A file left by a process that is gone is replaced.
pub(super) async fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |error| SocketError::Io {
        path: path.into(),
        error,
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.into()));
        }
        Ok(_) => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(SocketError::Taken(path.into()));
            }
            std::fs::remove_file(path).map_err(io)?;
        }
        Err(_) => {}
    }
    // Bound under another name and renamed, so that it is never there with wider permissions.
    let mut private = path.as_os_str().to_owned();
    private.push(".new");
    let private = PathBuf::from(private);
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private).map_err(io)?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    std::fs::rename(&private, path).map_err(io)?;
    Ok(listener)
}
