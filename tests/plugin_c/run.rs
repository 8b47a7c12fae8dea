//! Compiles a C plugin, and runs the program with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);
const NOBODY: u32 = 65534;
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_cellblock");

/// A plugin to run.
pub struct Plugin {
    name: String,
    cpus: u32,
    arguments: Vec<String>,
    sandbox: bool,
    options: Vec<String>,
    user: bool,
    example: bool,
}

impl Plugin {
    /// `tests/plugins/NAME.c`.
    pub fn new(name: &str) -> Plugin {
        Plugin {
            name: name.into(),
            cpus: 1,
            arguments: Vec::new(),
            sandbox: true,
            options: Vec::new(),
            user: false,
            example: false,
        }
    }

    /// `plugin-api/examples/NAME.c`.
    pub fn example(name: &str) -> Plugin {
        Plugin { example: true, ..Plugin::new(name) }
    }

    pub fn cpus(self, cpus: u32) -> Plugin {
        Plugin { cpus, ..self }
    }

    /// Behind the plugin's name, which is its `argv[0]`.
    pub fn arguments(self, arguments: &[&str]) -> Plugin {
        Plugin { arguments: arguments.iter().map(|a| a.to_string()).collect(), ..self }
    }

    pub fn sandbox(self, sandbox: bool) -> Plugin {
        Plugin { sandbox, ..self }
    }

    /// A word more for `cellblock run`.
    pub fn option(mut self, option: &str) -> Plugin {
        self.options.push(option.into());
        self
    }

    /// As an ordinary user who may open /dev/kvm.
    pub fn user(self) -> Plugin {
        Plugin { user: true, ..self }
    }

    #[track_caller]
    pub fn start(self) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let folder = if self.example { "plugin-api/examples" } else { "tests/plugins" };
        let mut path = compiled(folder, &self.name);
        let mut words: Vec<String> = Vec::new();
        let mut program = PathBuf::from(PROGRAM);
        if self.user {
            program = dir.path().join("cellblock");
            fs::copy(PROGRAM, &program).unwrap();
            let own = dir.path().join(&self.name);
            fs::copy(&path, &own).unwrap();
            fs::copy(library(), dir.path().join("libcrosvm_plugin.so")).unwrap();
            path = own;
            let group = fs::metadata("/dev/kvm").map(|m| std::os::unix::fs::MetadataExt::gid(&m));
            let user = format!("--reuid={NOBODY}");
            let own = format!("--regid={}", group.unwrap());
            words.extend(["setpriv", &user, &own, "--clear-groups", "--"].map(String::from));
            chown(dir.path(), Some(NOBODY), None).unwrap();
        }
        words.push(program.to_str().unwrap().into());
        words.extend(["run", "--die-with-parent", "--control", "control"].map(String::from));
        words.extend(["-c".into(), self.cpus.to_string(), "--plugin".into()]);
        words.extend([path.to_str().unwrap().into(), "-p".into(), self.name.clone()]);
        words.extend(self.arguments.iter().flat_map(|a| ["-p".to_string(), a.clone()]));
        if !self.sandbox {
            words.push("--disable-sandbox".into());
        }
        words.extend(self.options);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(dir.path())
            .env_remove("CELLBLOCK_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).unwrap();
            text
        });
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Vm { child, stdin, stdout, stderr: Some(stderr), dir }
    }
}

/// Compiles `FOLDER/NAME.c`, once.
pub fn compiled(folder: &str, name: &str) -> PathBuf {
    static DONE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("plugin-{name}"));
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if done.insert(name.into()) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name);
        compile(&source.with_extension("c"), &path);
    }
    path
}

/// The library that cargo built for this test.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libcrosvm_plugin.so")
}

fn compile(source: &Path, to: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = library().parent().unwrap().to_owned();
    let output = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-pthread", "-I"])
        .arg(root.join("plugin-api/include"))
        .arg(source)
        .arg("-o")
        .arg(to)
        .arg("-L")
        .arg(&folder)
        .args(["-lcrosvm_plugin", "-Wl,-rpath,$ORIGIN", "-Wl,-rpath"])
        .arg(&folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A running VM.
pub struct Vm {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: Option<JoinHandle<String>>,
    dir: tempfile::TempDir,
}

/// How it ended.
pub struct End {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Vm {
    /// The VMM's.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// A line from the plugin.
    #[track_caller]
    pub fn expect(&mut self, wanted: &str) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        if line.trim() != wanted {
            let _ = self.child.kill();
            let stderr = self.stderr.take().unwrap().join().unwrap();
            panic!("{line:?} instead of {wanted:?}: {stderr}");
        }
    }

    /// A line to the plugin.
    pub fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    /// Keys for the guest.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.stdin.write_all(keys).unwrap();
    }

    /// Waits until the VMM is in a state of /proc/PID/stat.
    pub fn wait_state(&self, wanted: char) {
        let until = Instant::now() + PATIENCE;
        loop {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            if stat.rsplit(") ").next().unwrap().starts_with(wanted) {
                return;
            }
            assert!(Instant::now() < until, "{stat}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Carries out a command on the control socket; what it prints.
    #[track_caller]
    pub fn control(&self, command: &str) -> String {
        let socket = self.dir.path().join("control");
        let output = Command::new(PROGRAM).arg(command).arg(socket).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(mut self) -> End {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > until {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("it does not end: {}", self.stderr.take().unwrap().join().unwrap());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        End { status, stderr: self.stderr.take().unwrap().join().unwrap() }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `cellblock run` with options that cannot work: its status and what it says.
pub fn usage(options: &[&str]) -> (Option<i32>, String) {
    let null = File::open("/dev/null").unwrap();
    let output = Command::new(PROGRAM)
        .arg("run")
        .args(options)
        .env_remove("CELLBLOCK_LOG")
        .stdin(null)
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}
