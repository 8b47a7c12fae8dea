//! The files a program needs to start: its loader and its libraries, found as the loader
//! would find them.
//!
//! What RPATH or RUNPATH names is shown in the jail where it is, and so is what lies in one
//! of the loader's own folders. What only ld.so.cache knows is shown beside the C library:
//! the jail has no ld.so.cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::elf::{self, Elf, ElfError};

/// Most libraries of a program.
const MAX_LIBRARIES: usize = 64;
/// The loader's folders, on distributions with and without multiarch, and musl's.
const FOLDERS: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// Looked for beside our own program too, where a build leaves it.
const OUR_LIBRARY: &str = "libcrosvm_plugin.so";

/// A file to show, and where.
#[derive(Debug)]
pub(super) struct Needed {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) inside: PathBuf,
    /// In no folder that the loader would look in by itself.
    elsewhere: bool,
}

/// A program that cannot be put into a jail.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum NeedsError {
    #[error("opening {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    #[error("{} cannot be used: {error}", path.display())]
    Elf { path: PathBuf, error: ElfError },
    #[error("{} needs the library {name}, which is in no folder the loader looks in", by.display())]
    Missing { name: String, by: PathBuf },
    #[error("{} needs a library called {name:?}: not a plain name", by.display())]
    Name { name: String, by: PathBuf },
    #[error("{} needs more than {MAX_LIBRARIES} libraries", .0.display())]
    TooMany(PathBuf),
    #[error("{} has the loader {loader:?}, which is not an absolute path", path.display())]
    Loader { path: PathBuf, loader: String },
}

/// An object as the loader sees it: with the RPATHs of those that wanted it.
struct Object {
    path: PathBuf,
    elf: Elf,
    inherited: Vec<PathBuf>,
}

/// The program itself first, then its loader and libraries, if it has any.
pub(super) fn of(program: &Path) -> Result<Vec<Needed>, NeedsError> {
    let path = std::fs::canonicalize(program)
        .map_err(|source| NeedsError::Open { path: program.to_owned(), source })?;
    let file = open(&path)?;
    let elf = read(&file, &path)?;
    let loader = elf.interpreter.clone();
    let shown = |file, path: PathBuf| Needed { file, inside: path.clone(), path, elsewhere: false };
    let mut list = vec![shown(file, path.clone())];
    let Some(loader) = loader else { return Ok(list) };
    if !loader.starts_with('/') {
        return Err(NeedsError::Loader { path, loader });
    }
    let loader = PathBuf::from(loader);
    let file = open(&loader)?;
    read(&file, &loader)?;
    let real = std::fs::canonicalize(&loader)
        .map_err(|source| NeedsError::Open { path: loader.clone(), source })?;
    let folder = real.parent().unwrap_or(Path::new("/")).to_owned();
    let mut names: Vec<String> =
        [&loader, &real].iter().filter_map(|p| Some(p.file_name()?.to_str()?.to_owned())).collect();
    list.push(shown(file, loader));

    let search = Search { cache: Cache::read(), folder };
    let mut objects = vec![Object { path, elf, inherited: Vec::new() }];
    let mut next = 0;
    while let Some(object) = objects.get(next) {
        let mut found = Vec::new();
        for name in &object.elf.needed {
            if names.contains(name) {
                continue;
            }
            names.push(name.clone());
            if names.len() > MAX_LIBRARIES + 2 {
                return Err(NeedsError::TooMany(objects[0].path.clone()));
            }
            let (library, elf) = search.find(name, object)?;
            let inherited = object.rpath();
            found.push(Object { path: library.path.clone(), elf, inherited });
            list.push(library);
        }
        objects.extend(found);
        next += 1;
    }
    // The loader looks where it finds the C library; musl's is the loader itself.
    let is_libc = |n: &&Needed| n.inside.to_string_lossy().contains("/libc.so");
    let home = list.iter().find(is_libc).and_then(|libc| libc.inside.parent());
    let home = home.unwrap_or(&search.folder).to_owned();
    for needed in list.iter_mut().filter(|needed| needed.elsewhere) {
        if let Some(name) = needed.path.file_name() {
            needed.inside = home.join(name);
        }
    }
    Ok(list)
}

impl Object {
    fn origin(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    fn expand(&self, folders: &[String]) -> Vec<PathBuf> {
        let origin = self.origin().to_string_lossy();
        let expand = |folder: &String| {
            PathBuf::from(folder.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin))
        };
        folders.iter().map(expand).filter(|path| path.is_absolute()).collect()
    }

    /// Its RPATH and that of those that wanted it.
    fn rpath(&self) -> Vec<PathBuf> {
        let mut all = self.expand(&self.elf.rpath);
        all.extend(self.inherited.iter().cloned());
        all
    }
}

struct Search {
    cache: Cache,
    /// The loader's.
    folder: PathBuf,
}

impl Search {
    fn find(&self, name: &str, by: &Object) -> Result<(Needed, Elf), NeedsError> {
        if name.contains('/') || matches!(name, "." | "..") {
            return Err(NeedsError::Name { name: name.into(), by: by.path.clone() });
        }
        let own = if by.elf.runpath.is_empty() { by.rpath() } else { by.expand(&by.elf.runpath) };
        for folder in own {
            if let Some(found) = library(&folder.join(name))? {
                return Ok(found);
            }
        }
        let mut candidates: Vec<PathBuf> = self.cache.find(name).into_iter().collect();
        candidates.extend(FOLDERS.iter().map(|folder| Path::new(folder).join(name)));
        candidates.push(self.folder.join(name));
        if name == OUR_LIBRARY
            && let Ok(program) = std::env::current_exe()
        {
            candidates.push(program.with_file_name(name));
        }
        for path in candidates {
            if let Some((mut needed, elf)) = library(&path)? {
                needed.elsewhere = !path
                    .parent()
                    .is_some_and(|folder| FOLDERS.iter().any(|f| folder == Path::new(f)));
                return Ok((needed, elf));
            }
        }
        Err(NeedsError::Missing { name: name.into(), by: by.path.clone() })
    }
}

/// The library at `path`, if there is one for this machine.
fn library(path: &Path) -> Result<Option<(Needed, Elf)>, NeedsError> {
    let file = match open(path) {
        Ok(file) => file,
        Err(NeedsError::Open { source, .. })
            if matches!(
                source.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // Those for other machines are passed over, as the loader does.
    let elf = match elf::read(&file) {
        Ok(elf) => elf,
        Err(ElfError::Machine) => return Ok(None),
        Err(error) => return Err(NeedsError::Elf { path: path.to_owned(), error }),
    };
    let path = path.to_owned();
    Ok(Some((Needed { file, inside: path.clone(), path, elsewhere: false }, elf)))
}

fn open(path: &Path) -> Result<File, NeedsError> {
    let fail = |source| NeedsError::Open { path: path.to_owned(), source };
    // A FIFO without a peer must not hang the start.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(fail)?;
    match file.metadata().map_err(fail)?.is_file() {
        true => Ok(file),
        false => Err(NeedsError::NotAFile(path.to_owned())),
    }
}

fn read(file: &File, path: &Path) -> Result<Elf, NeedsError> {
    elf::read(file).map_err(|error| NeedsError::Elf { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the loader's own word, for a program that is no enemy.
    #[test]
    fn as_the_loader_finds_them() {
        let program = std::env::current_exe().expect("this test");
        let list = of(&program).expect("found");
        let output = std::process::Command::new("ldd").arg(&program).output().expect("ldd runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let mut count = 0;
        for line in text.lines() {
            let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
            let path = rest.split(' ').next().expect("a path");
            let ours = list
                .iter()
                .find(|needed| needed.inside.file_name().is_some_and(|n| n == name))
                .unwrap_or_else(|| panic!("{name} is missing"));
            let real = |path: &Path| std::fs::canonicalize(path).expect("exists");
            assert_eq!(real(&ours.path), real(Path::new(path)));
            count += 1;
        }
        assert_eq!(list.len(), count + 2); // the program and the loader
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("plugin");
        let error = |path: &Path| of(path).expect_err("no program").to_string();
        assert!(error(&path).contains("opening"));
        std::fs::write(&path, "#!/bin/sh\n").expect("written");
        assert!(error(&path).contains("it is a script"));
        assert!(error(dir.path()).contains("is not a file"));
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        assert!(error(&dir.path().join("fifo")).contains("is not a file"));
    }
}
