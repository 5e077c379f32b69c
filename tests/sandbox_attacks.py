r"""Programs that try to leave the sandbox, exhaust the machine, or lie to the caller, and what must come of each.

A program calls `escaped(...)` where it succeeded, as far as it can see itself; `$name` stands for a place on the host
(see `World` in test_sandbox_attacks.py, which watches from outside). What is left to show after a run is how the
program was stopped: the last line of its error, or the line `contained: ...` that it printed itself.

`control` marks the programs that are harmless on the host: the tests run them there without any isolation, and they
must be seen to escape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# The marker is put together when it is printed: a traceback that quotes the program never shows it.
PRELUDE = """
def escaped(*what):
    print("ESC" + "APED", *what)
"""
ESCAPED = "ESCAPED"

# Secrets of the host look like this; no program contains one.
SECRET = r"canary-[0-9a-f]{32}"

# Errors by which the kernel refuses.
DENIED = (
    r"^(PermissionError|FileNotFoundError|OSError|ConnectionRefusedError|ProcessLookupError"
    r"|socket\.gaierror|urllib\.error\.URLError)\b"
)
SAID = "^contained: "
LIMIT = r"^stopped at the time limit"
MEMORY = r"^(MemoryError|numpy\._core\._exceptions\._ArrayMemoryError|OSError)\b"
LOST = r"^stopped"
OUTPUT = r"^output cut"


@dataclass(frozen=True)
class Attack:
    """One program.

    Attributes:
        name: Unique.
        kind: The group that it belongs to.
        tries: What it tries, for the table of the docs.
        code: The program, after `PRELUDE`, `$name`s not yet filled in.
        contained: Pattern of what must have stopped it inside bubblewrap.
        monty: The same for Monty, where most programs end at a module that does not exist.
        control: Harmless on the host, where it must succeed.
        timeout: Seconds of its call.
        after: Code run in the same session afterwards and what it prints; "" where a program may have spoiled its own
            session, which then need only answer.
    """

    name: str
    kind: str
    tries: str
    code: str
    contained: str = DENIED
    monty: str = r"^contained: |^[\w.]+(Error|Exit|Interrupt|Exception)\b|^stopped at"
    control: bool = False
    timeout: float = 5.0
    after: tuple[str, str] = ("print('after', 6 * 7)", "after 42\n")


ATTACKS: list[Attack] = []


def _group(kind: str) -> Callable[..., None]:
    def add(name: str, tries: str, code: str, **options: object) -> None:
        ATTACKS.append(Attack(name, kind, tries, code.strip("\n") + "\n", **options))  # type: ignore[arg-type]

    return add


# System calls by number, for what Python has no function for; a refusal is raised as an OSError.
SYSCALL = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = dict(zip(
    ("ptrace unshare setns mount umount2 pivot_root chroot bpf add_key keyctl io_uring_setup userfaultfd "
     "perf_event_open open_by_handle_at init_module kexec_load reboot clock_settime sethostname swapon personality "
     "capset clone3 memfd_create shmget shmat shmdt msgget msgsnd process_vm_readv fsopen name_to_handle_at "
     "pidfd_open pidfd_getfd prctl acct quotactl syslog process_vm_writev kcmp landlock_create_ruleset "
     "pidfd_send_signal").split(),
    {"x86_64": (101, 272, 308, 165, 166, 155, 161, 321, 248, 250, 425, 323, 298, 304, 175, 246, 169, 227, 170, 167,
                135, 126, 435, 319, 29, 30, 67, 68, 69, 310, 430, 303, 434, 438, 157, 163, 179, 103, 311, 312, 444,
                424),
     "aarch64": (117, 97, 268, 40, 39, 41, 51, 280, 217, 219, 425, 282, 241, 265, 105, 104, 142, 112, 161, 224,
                 92, 91, 435, 279, 194, 196, 197, 186, 189, 270, 430, 264, 434, 438, 167, 89, 60, 116, 271, 272, 444,
                 424),
    }[platform.machine()]))
def syscall(name, *arguments):
    ctypes.set_errno(0)
    number = name if isinstance(name, int) else NUMBERS[name]
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    found = libc.syscall(ctypes.c_long(number), *arguments)
    if found == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(name))
    return found
"""


# --- network ---------------------------------------------------------------------------------------------------------
_add = _group("network")
_add(
    "tcp_connect",
    "connects to a TCP port of the host",
    """
import socket
connection = socket.create_connection(("127.0.0.1", $tcp), 2)
escaped(connection.recv(1000))
""",
    control=True,
)
_add(
    "udp_send",
    "sends a datagram to the host and waits for the answer",
    """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.5)
s.connect(("127.0.0.1", $udp))
s.send(b"hello")
escaped(s.recv(1000))
""",
    control=True,
)
_add(
    "ipv6_connect",
    "connects to the host over IPv6",
    """
import socket
s = socket.socket(socket.AF_INET6)
s.settimeout(1)
s.connect(("::ffff:127.0.0.1", $tcp))
escaped(s.recv(1000))
""",
    control=True,
)
_add(
    "dns_lookup",
    "resolves a name",
    """
import socket
escaped(socket.getaddrinfo("example.com", 80))
""",
)
_add(
    "urllib_http",
    "fetches a page from the host",
    """
import urllib.request
escaped(urllib.request.urlopen("http://127.0.0.1:$tcp/", timeout=2).read())
""",
    control=True,
)
_add(
    "route_out",
    "connects to an address of the internet",
    """
import socket
s = socket.socket()
s.settimeout(1)
s.connect(("192.0.2.1", 80))
escaped()
""",
)
_add(
    "unix_socket",
    "connects to a Unix socket of the host by its path",
    """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("$unix")
escaped(s.recv(1000))
""",
    control=True,
)
_add(
    "abstract_socket",
    "connects to an abstract Unix socket of the host, which no file system hides",
    """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\\0$abstract")
escaped(s.recv(1000))
""",
    control=True,
)
_add(
    "raw_socket",
    "opens a raw socket",
    """
import socket
escaped(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
""",
)
_add(
    "packet_socket",
    "opens a packet socket to read the wire",
    """
import socket
escaped(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300))
""",
)
_add(
    "netlink_interfaces",
    "lists network interfaces by netlink",
    """
import socket
names = [name for _, name in socket.if_nameindex() if name != "lo"]
escaped(names) if names else print("contained: no interface but lo")
""",
    contained=f"{DENIED}|{SAID}",
)
_add(
    "netlink_sockets",
    "opens the netlink sockets of auditing, routing and the kernel's events",
    """
import socket
opened = []
for protocol in (9, 15, 16, 12, 4):
    try:
        s = socket.socket(16, socket.SOCK_RAW, protocol)
        s.bind((0, 1))
        opened.append(protocol)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason)
""",
    contained=SAID,
)
_add(
    "abstract_datagram",
    "sends from a socket pair, which needs no address, to a datagram socket of the host",
    """
import socket
reason = None
for address in ("\\0$abstract-datagram", "$directory/datagram"):
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        pair[0].sendto(b"hello", address)
        escaped(address)
    except OSError as error:
        reason = error
print("contained:", reason)
""",
    contained=f"{SAID}|{DENIED}",
    control=True,
)
_add(
    "vsock",
    "opens a socket to the hypervisor, which a network namespace may not hide",
    """
import socket
escaped(socket.socket(40, socket.SOCK_STREAM))
""",
)
_add(
    "odd_families",
    "opens sockets of rare families, whose modules the kernel would load",
    """
import socket
opened = []
for family in (3, 4, 5, 6, 9, 11, 15, 19, 20, 21, 23, 24, 26, 29, 30, 31, 33, 35, 36, 37, 38, 39, 41, 42, 43, 44):
    for kind in (1, 2, 3, 5):
        try:
            opened.append((family, socket.socket(family, kind, 0)))
        except OSError as error:
            reason = error
escaped(opened) if opened else print("contained:", reason)
""",
    contained=SAID,
)

# --- reading ---------------------------------------------------------------------------------------------------------
_add = _group("reading")
_add("open_canary", "opens a file of the host", "escaped(open('$canary').read())", control=True)
_add(
    "pathlib_canary",
    "reads a file of the host by pathlib",
    """
from pathlib import Path
escaped(Path("$canary").read_text())
""",
    control=True,
)
_add(
    "pathlib_listing",
    "lists a folder of the host by pathlib",
    """
from pathlib import Path
escaped([str(path) for path in Path("$directory").iterdir()])
""",
    control=True,
)
_add(
    "dot_dot",
    "climbs out by ../../..",
    "escaped(open('../' * 40 + '$canary'.lstrip('/')).read())",
    control=True,
)
_add(
    "numpy_file",
    "reads a file of the host by NumPy, as gets past checkers of source code",
    """
import numpy as np
escaped(np.fromfile("$canary", dtype=np.uint8).tobytes())
""",
    control=True,
)
_add(
    "file_url",
    "opens file:// by urllib",
    """
import urllib.request
escaped(urllib.request.urlopen("file://$canary").read())
""",
    control=True,
)
_add("passwd", "reads /etc/passwd", "escaped(open('/etc/passwd').read())", control=True)
_add("shadow", "reads /etc/shadow", "escaped(open('/etc/shadow').read())")
_add(
    "homes",
    "lists the home folders",
    """
import glob, sys
found = [*glob.glob("/root/*"), *glob.glob("/root/.*"), *glob.glob("/home/*"), *glob.glob("/home/*/.*")]
# The folders above the interpreter are there, with nothing else in them.
found = [path for path in found if not sys.base_prefix.startswith(path)]
escaped(found) if found else print("contained: no home folders")
""",
    contained=SAID,
)
_add(
    "ancestors",
    "looks for a file of the host in every folder above it",
    """
import os
folder, seen = "$directory", []
while folder != "/":
    try:
        seen += os.listdir(folder)
    except OSError:
        pass
    folder = os.path.dirname(folder)
escaped(seen) if "canary" in seen else print("contained: not in any folder above")
""",
    contained=SAID,
    control=True,
)
_add(
    "project",
    "reads the folder of the project that runs the sandbox",
    "escaped(open('$project/pyproject.toml').read(200))",
    control=True,
)
_add(
    "import_host",
    "imports the package that runs the sandbox and reads beside it",
    """
import ctpo, os
escaped(open(os.path.join(os.path.dirname(ctpo.__file__), "train", "sandbox.py")).read(100))
""",
    contained=f"^ModuleNotFoundError|{DENIED}",
)
_add(
    "disks",
    "opens disks and memory of the machine in /dev",
    """
import glob, os, stat
opened = []
for path in glob.glob("/dev/**", recursive=True):
    mode = os.stat(path).st_mode
    known = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and path not in (*known, "/dev/pts/ptmx", "/dev/ptmx")):
        opened.append(path)
escaped(opened) if opened else print("contained: no such devices")
""",
    contained=SAID,
)
_add(
    "sys_files",
    "reads the kernel's files in /sys",
    """
import glob
found = glob.glob("/sys/*")
escaped(found) if found else print("contained: /sys is empty or absent")
""",
    contained=SAID,
    control=True,
)
_add(
    "symlink",
    "makes a symbolic link in tmp to a file of the host",
    """
import os, tempfile
link = os.path.join(tempfile.mkdtemp(), "link")
os.symlink("$canary", link)
escaped(open(link).read())
""",
    control=True,
)
_add(
    "hardlink",
    "makes a hard link in tmp to a file of the host and to one of the system",
    """
import os, tempfile
target = os.path.join(tempfile.mkdtemp(), "link")
os.link("$canary", target)
escaped(open(target).read())
""",
    control=True,
)
_add(
    "leaked_descriptors",
    "opens files relative to every open file descriptor",
    """
import os
for fd in range(1024):
    for path in ("$canary".lstrip("/"), "../" * 40 + "$canary".lstrip("/"), "etc/shadow"):
        try:
            escaped(fd, os.read(os.open(path, os.O_RDONLY, dir_fd=fd), 1000))
        except OSError:
            pass
print("contained: no descriptor leads outside")
""",
    contained=SAID,
)
_add(
    "descriptors_listed",
    "looks what its open file descriptors are",
    """
import os
odd = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        where = os.readlink("/proc/self/fd/" + fd)
    except OSError:
        continue
    if where.startswith("/") and not where.startswith(("/dev/null", "/tmp", "/proc/")):
        odd[fd] = where
escaped(odd) if odd else print("contained: pipes, sockets and /dev/null only")
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "setuid_programs",
    "looks for privileges to use: capabilities, or setuid programs that would still give them",
    """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
held = {key: status[key].strip() for key in ("CapPrm", "CapEff", "CapAmb") if int(status[key], 16)}
if status["NoNewPrivs"].strip() != "1":
    held["NoNewPrivs"] = "0"
escaped(held) if held else print("contained: no capabilities, no new privileges")
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "host_name",
    "learns the name of the host",
    """
import os
name = os.uname().nodename
escaped(name) if name == "$hostname" else print("contained: the name is", name)
""",
    contained=SAID,
    control=True,
)

# --- environment and memory ------------------------------------------------------------------------------------------
_add = _group("environment")
_add(
    "environ",
    "prints os.environ",
    """
import os
escaped(os.environ['CTPO_ATTACK_SECRET'])
""",
    contained="^KeyError",
    control=True,
)
_add(
    "getenv",
    "asks os.getenv",
    """
import os
value = os.getenv("CTPO_ATTACK_SECRET")
escaped(value) if value else print("contained: not set")
""",
    contained=SAID,
    control=True,
)
_add(
    "whole_environment",
    "prints everything that the environment holds",
    """
import os, re
print(sorted(os.environ))
for value in os.environ.values():
    if re.fullmatch("[a-z]+-[0-9a-f]{32}", value):
        escaped(value)
print("contained:", len(os.environ), "variables, none of the host's")
""",
    contained=SAID,
    control=True,
)
_add(
    "libc_environ",
    "reads the environment of C",
    """
import ctypes
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
value = libc.getenv(b"CTPO_ATTACK_SECRET")
escaped(value) if value else print("contained: not set")
""",
    contained=SAID,
    control=True,
)
_add(
    "proc_environ",
    "reads the environment of every process it sees, the first one's too",
    """
import glob
found = 0
for path in ["/proc/1/environ", *glob.glob("/proc/[0-9]*/environ"), *glob.glob("/proc/[0-9]*/task/*/environ")]:
    try:
        text = open(path, "rb").read()
    except OSError:
        continue
    found += 1
    if b"CTPO_ATTACK_SECRET" in text:
        escaped(text)
print("contained:", "nothing of the host in the environments that can be read")
""",
    contained=SAID,
    control=True,
)
_add(
    "own_memory",
    "searches its own memory for secrets that a fork of the host would have left there",
    """
import re
hits, needle = set(), re.compile(rb"canary-[0-9a-f]{32}")
with open("/proc/self/mem", "rb", 0) as memory:
    for line in open("/proc/self/maps"):
        (low, high), rights = (int(part, 16) for part in line.split()[0].split("-")), line.split()[1]
        if "r" not in rights:
            continue
        for start in range(low, high, 1 << 22):
            try:
                memory.seek(start)
                hits.update(needle.findall(memory.read(min(1 << 22, high - start))))
            except (OSError, ValueError, OverflowError):
                break
escaped(hits) if hits else print("contained: not in its memory")
""",
    contained=f"{SAID}|{DENIED}|^MemoryError",
    control=True,
    timeout=20.0,
)

# --- processes -------------------------------------------------------------------------------------------------------
_add = _group("processes")
_add(
    "list_processes",
    "looks for a process of the host in /proc",
    """
import glob
lines = []
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        lines.append(open(path).read())
    except OSError:
        pass
escaped() if any("$marker" in line for line in lines) else print("contained: not among the processes it sees")
""",
    contained=SAID,
    control=True,
)
_add(
    "proc_root",
    "goes through /proc/<pid>/root and cwd of every process",
    """
import glob
for path in [*glob.glob("/proc/[0-9]*/root"), *glob.glob("/proc/[0-9]*/cwd")]:
    for name in ("$canary", "/" + "../" * 40 + "$canary".lstrip("/")):
        try:
            escaped(path, open(path + name).read())
        except OSError:
            pass
print("contained: no process leads outside")
""",
    contained=SAID,
    control=True,
)
_add(
    "kernel_files",
    "opens kcore, kmsg, the keys and the page maps of the kernel in /proc",
    """
opened = []
for path in ("/proc/kcore", "/proc/kmsg", "/proc/sysrq-trigger", "/proc/timer_list", "/proc/slabinfo",
             "/proc/kpagecount", "/proc/kpageflags", "/proc/vmallocinfo", "/proc/1/mem", "/proc/1/auxv"):
    try:
        if open(path, "rb", 0).read(1):
            opened.append(path)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "kernel_addresses",
    "reads the addresses of the kernel's functions",
    """
addresses = {line.split()[0] for line in open("/proc/kallsyms")}
escaped(len(addresses)) if len(addresses) > 1 else print("contained: addresses are hidden")
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "sysctl",
    "opens the settings of the kernel for writing, core_pattern among them",
    """
import os
opened = []
for folder, _, names in os.walk("/proc/sys"):
    for name in names:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_WRONLY))
            opened.append(os.path.join(folder, name))
        except OSError:
            pass
escaped(opened) if opened else print("contained: none can be opened for writing")
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "sysrq",
    "opens sysrq-trigger and other writable files of /proc",
    """
import os
opened = []
for path in ("sysrq-trigger", "acpi", "irq/default_smp_affinity", "mtrr", "scsi/scsi", "1/oom_score_adj", "1/mem",
             "1/uid_map", "1/gid_map", "1/setgroups", "1/attr/current", "1/comm", "1/clear_refs", "bus/pci"):
    try:
        os.close(os.open("/proc/" + path, os.O_WRONLY))
        opened.append(path)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "ptrace_attach",
    "attaches to other processes by ptrace",
    SYSCALL
    + """
for pid in {1, os.getppid(), *(int(name) for name in os.listdir("/proc") if name.isdigit()), $victim}:
    if pid != os.getpid() and pid:
        try:
            syscall("ptrace", 16, pid, 0, 0)
            escaped(pid)
        except OSError as error:
            reason = error
print("contained:", "no process to attach to" if "reason" not in globals() else reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "ptrace_child",
    "traces a child of its own, to change system calls after the filter has seen them",
    SYSCALL
    + """
import signal
child = os.fork()
if child == 0:
    signal.pause()
try:
    syscall("ptrace", 16, child, 0, 0)
    os.waitpid(child, 0)
    escaped()
finally:
    os.kill(child, signal.SIGKILL)
""",
    contained=DENIED,
)
_add(
    "process_vm_readv",
    "reads the memory of other processes",
    SYSCALL
    + """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(64)
local = Vector(ctypes.addressof(buffer), 64)
for pid in {1, os.getppid(), *(int(name) for name in os.listdir("/proc") if name.isdigit()), $victim}:
    if pid == os.getpid() or not pid:
        continue
    try:
        maps = [line.split("-")[0] for line in open(f"/proc/{pid}/maps")]
    except OSError:
        maps = ["400000"]
    for start in maps:
        remote = Vector(int(start, 16), 64)
        try:
            escaped(pid, syscall("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
        except OSError as error:
            reason = error
print("contained:", "no process to read" if "reason" not in globals() else reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "proc_mem",
    "writes to the memory of its parent through /proc",
    """
import os
for pid in {1, os.getppid(), *(int(name) for name in os.listdir("/proc") if name.isdigit())} - {os.getpid(), 0}:
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
        escaped(pid)
    except OSError as error:
        reason = error
print("contained:", "no other process" if "reason" not in globals() else reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "pidfd_getfd",
    "takes open files from other processes",
    SYSCALL
    + """
for pid in {1, os.getppid(), *(int(name) for name in os.listdir("/proc") if name.isdigit())} - {os.getpid(), 0}:
    try:
        handle = syscall("pidfd_open", pid, 0)
        for fd in range(64):
            try:
                escaped(pid, fd, syscall("pidfd_getfd", handle, fd, 0))
            except OSError as error:
                reason = error
    except OSError as error:
        reason = error
print("contained:", "no other process" if "reason" not in globals() else reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "peer_process",
    "gets a handle of the process at the other end of its socket",
    """
import os, socket
reasons = set()
for fd in range(3, 64):
    try:
        connection = socket.socket(fileno=os.dup(fd))
    except OSError:
        continue
    for option in (77, 17, 59):  # SO_PEERPIDFD, SO_PEERCRED, SO_PEERGROUPS
        try:
            escaped(option, connection.getsockopt(socket.SOL_SOCKET, option))
        except OSError as error:
            reasons.add(error.strerror)
print("contained:", *reasons)
""",
    contained="^contained: Operation not permitted$",
)
_add(
    "locks",
    "locks files of the host that it may only read",
    """
import fcntl, os
escaped(fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB))
""",
)
_add(
    "kill_all",
    "kills every process it may",
    """
import os
os.kill(-1, 9)
print('contained: no process of others')
""",
    contained=f"{LOST}|{SAID}|{DENIED}",
)
_add(
    "kill_parent",
    "kills its parent and the first process",
    """
import os, signal
for pid in (os.getppid(), 1):
    if pid:
        os.kill(pid, signal.SIGKILL)
print("contained: nothing was there to kill")
""",
    contained=f"{LOST}|{SAID}|{DENIED}",
)
_add(
    "kill_group",
    "kills its process group",
    """
import os
os.killpg(0, 9)
""",
    contained=f"{LOST}|{DENIED}",
)
_add(
    "kill_victim",
    "kills a process of the host by its number",
    """
import os
os.kill($victim, 9)
escaped()
""",
    control=True,
)
_add(
    "kill_numbers",
    "kills every number up to 40000",
    """
import os
hit = []
for pid in range(2, 40000):
    if pid != os.getpid():
        try:
            os.kill(pid, 9)
            hit.append(pid)
        except OSError:
            pass
escaped(hit) if hit else print("contained: no such processes")
""",
    contained=f"{SAID}|{LOST}",
)
_add(
    "run_shell",
    "runs a shell by subprocess",
    """
import subprocess
print(subprocess.run('cat $canary', shell=True, capture_output=True))
print('contained: the shell, where there is one, is in the jail too')
""",
    contained=f"{SAID}|{DENIED}|^BlockingIOError",
    control=True,
)
_add(
    "exec_shell",
    "becomes a shell",
    """
import os
os.execv('/bin/sh', ['sh', '-c', 'cat $canary; id; ls /'])
""",
    contained=f"{LOST}|{DENIED}",
    control=True,
)
_add(
    "multiprocessing",
    "reads by processes of multiprocessing",
    """
import multiprocessing
def work(pipe):
    try:
        pipe.send(open("$canary").read())
    except OSError as error:
        pipe.send(f"contained: {error.strerror}")
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()  # a queue would need a semaphore first
process = context.Process(target=work, args=(theirs,))
process.start()
process.join()
print(ours.recv())
""",
    contained=f"{SAID}|{DENIED}",
    control=True,
)
_add(
    "daemon",
    "leaves a process behind that outlives its session",
    """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
print("contained: the process ends with its session")
""",
    contained=f"{SAID}|{DENIED}|^BlockingIOError",
)
_add(
    "priority",
    "raises its priority",
    """
import os
gained = []
for name, raise_ in {
    "nice": lambda: os.nice(-5),
    "fifo": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "oom": lambda: open("/proc/self/oom_score_adj", "w", 1).write("-1000\\n"),
}.items():
    try:
        raise_()
        gained.append(name)
    except OSError as error:
        reason = error
escaped(gained) if gained else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "raise_limits",
    "raises its resource limits",
    """
import resource
raised = []
for name in ("AS", "DATA", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK", "RTPRIO", "NICE", "MSGQUEUE"):
    number = getattr(resource, "RLIMIT_" + name)
    soft, hard = resource.getrlimit(number)
    if hard == resource.RLIM_INFINITY:
        continue
    try:
        resource.setrlimit(number, (soft, hard + 1))
        raised.append(name)
    except (ValueError, OSError) as error:
        reason = error
escaped(raised) if raised else print("contained:", reason)
""",
    contained=SAID,
)

# --- writing ---------------------------------------------------------------------------------------------------------
_add = _group("writing")
_add(
    "append_canary",
    "appends to a file of the host",
    """
open('$canary', 'a').write('changed')
escaped()
""",
    control=True,
)
_add(
    "pathlib_write",
    "writes a file of the host by pathlib",
    """
from pathlib import Path
Path("$directory/new").write_text("here")
""",
    contained=f"{DENIED}",
    control=True,
)
_add(
    "same_path",
    "makes the folder of the host again in its own tmp and writes there",
    """
import os
os.makedirs("$directory", exist_ok=True)
open("$directory/new", "w").write("here")
print("contained: written to a folder of its own")
""",
    contained=f"{SAID}|{DENIED}",
    control=True,
)
_add(
    "system_folders",
    "writes to every folder of the system but tmp",
    """
import os
places = ["/", "/usr", "/usr/bin", "/usr/lib", "/bin", "/lib", "/lib64", "/etc", "/opt", "/var", "/var/tmp", "/run",
          "/home", "/root", "/srv", "/mnt", "/dev", "/dev/pts", "/proc", "/sys", "/app", "/data"]
written = []
for folder in places:
    path = os.path.join(folder, "ctpo-attack")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        written.append(path)
        os.unlink(path)
    except OSError as error:
        reason = error
escaped(written) if written else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "any_folder",
    "looks for any folder outside tmp that can be written to",
    """
import os
written = []
for folder, names, _ in os.walk("/"):
    depth = folder.count("/")
    if folder.startswith(("/proc", "/sys", "/tmp")) or depth > 3:
        names.clear()
        continue
    if os.access(folder, os.W_OK):
        try:
            os.mkdir(os.path.join(folder, "ctpo-attack"))
            written.append(folder)
            os.rmdir(os.path.join(folder, "ctpo-attack"))
        except OSError:
            pass
escaped(written) if written else print("contained: none but tmp")
""",
    contained=SAID,
)
_add(
    "site_packages",
    "plants sitecustomize.py, a .pth file and bytecode where Python looks for modules",
    """
import os, sys
written = []
for folder in sys.path:
    for name in ("sitecustomize.py", "usercustomize.py", "attack.pth", "__pycache__/attack.pyc"):
        path = os.path.join(folder, name)
        if not os.path.abspath(path).startswith("/tmp/"):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
                written.append(path)
                os.unlink(path)
            except OSError as error:
                reason = error
escaped(written) if written else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "metadata",
    "changes mode, owner, times and names of programs of the system",
    """
import os
done = []
for name, change in {
    "chmod": lambda: os.chmod("/usr/bin/env", os.stat("/usr/bin/env").st_mode & 0o7777),
    "chown": lambda: os.chown("/usr/bin/env", os.getuid(), os.getgid()),
    "utime": lambda: os.utime("/usr/bin/env"),
    "rename": lambda: os.rename("/usr/bin/env", "/usr/bin/env"),
    "link": lambda: os.link("/usr/bin/env", "/usr/bin/ctpo-attack"),
    "xattr": lambda: os.setxattr("/usr/bin/env", "user.x", b"1"),
}.items():
    try:
        change()
        if name != "rename":
            done.append(name)
    except OSError as error:
        reason = error
escaped(done) if done else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "device_times",
    "changes the times of devices, which are the host's own",
    """
import os
reasons = set()
for name in os.listdir("/dev"):
    for times in (None, (0, 0)):
        try:
            os.utime("/dev/" + name, times)
            escaped(name)
        except OSError as error:
            reasons.add(error.strerror)
print("contained:", *reasons)
""",
    contained="^contained: Read-only file system$",
)
_add(
    "own_executable",
    "opens the programs that run it for writing, through /proc/<pid>/exe",
    """
import glob, os, sys
opened = []
for path in [sys.executable, *glob.glob("/proc/[0-9]*/exe"), *glob.glob("/proc/[0-9]*/map_files/*")]:
    try:
        os.close(os.open(path, os.O_WRONLY))
        opened.append(path)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "device_node",
    "makes a device node of a disk and of kernel memory in tmp and opens it",
    """
import os, stat
opened = []
for kind, major, minor in ((stat.S_IFBLK, 8, 0), (stat.S_IFBLK, 259, 0), (stat.S_IFBLK, 254, 0), (stat.S_IFCHR, 1, 1)):
    path = f"/tmp/node-{major}-{minor}"
    try:
        os.mknod(path, kind | 0o600, os.makedev(major, minor))
        os.close(os.open(path, os.O_RDONLY))
        opened.append(path)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "setuid_file",
    "makes a setuid copy of a shell in tmp",
    """
import os, shutil
shutil.copy("/bin/sh", "/tmp/sh")
os.chmod("/tmp/sh", 0o6755)
flags = os.statvfs("/tmp").f_flag
print("contained: tmp is mounted nosuid") if flags & os.ST_NOSUID else escaped(flags)
""",
    contained=f"{SAID}|{DENIED}",
)

# --- system calls ----------------------------------------------------------------------------------------------------
_add = _group("system calls")
for _name, _tries, _call in (
    ("unshare_user", "makes a user namespace of its own", 'syscall("unshare", 0x10000000)'),
    ("unshare_mount", "makes a mount namespace of its own", 'syscall("unshare", 0x20000)'),
    (
        "clone3_user",
        "makes a user namespace by clone3",
        'syscall("clone3", (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17), 88) or os._exit(0)',
    ),
    ("mount_tmpfs", "mounts a file system", 'syscall("mount", b"none", b"/tmp", b"tmpfs", 0, 0)'),
    ("mount_proc", "mounts a proc of its own", 'syscall("mount", b"proc", b"/tmp", b"proc", 0, 0)'),
    ("remount", "mounts / writable again", 'syscall("mount", b"none", b"/", b"", 0x1020, 0)'),
    ("remount_usr", "mounts /usr writable again", 'syscall("mount", b"none", b"/usr", b"", 0x1020, 0)'),
    ("umount", "takes the root away", 'syscall("umount2", b"/", 2)'),
    ("umount_proc", "uncovers what lies below /proc", 'syscall("umount2", b"/proc", 2)'),
    ("fsopen", "mounts by the new interface", 'syscall("fsopen", b"tmpfs", 0)'),
    ("pivot_root", "changes the root", 'syscall("pivot_root", b"/tmp", b"/tmp")'),
    ("chroot", "leaves the root by chroot and ..", 'syscall("chroot", b"/tmp")'),
    ("bpf", "loads a program into the kernel", 'syscall("bpf", 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72)'),
    ("add_key", "keeps a key in the kernel for the next session", 'syscall("add_key", b"user", b"ctpo", b"x", 1, -4)'),
    ("keyctl", "reads keys from the kernel", 'syscall("keyctl", 0, -4, 1)'),
    (
        "io_uring",
        "opens io_uring, which system call filters do not see",
        'syscall("io_uring_setup", 1, ctypes.create_string_buffer(120))',
    ),
    ("userfaultfd", "opens userfaultfd, a tool of kernel exploits", 'syscall("userfaultfd", 0)'),
    (
        "perf_event_open",
        "measures other processes",
        'syscall("perf_event_open", (ctypes.c_uint64 * 16)(0x7000000001), 0, -1, -1, 0)',
    ),
    ("init_module", "loads a kernel module", 'syscall("init_module", b"x", 1, b"")'),
    ("kexec", "loads another kernel", 'syscall("kexec_load", 0, 0, 0, 0)'),
    ("reboot", "turns Ctrl-Alt-Del off, as reboot would need", 'syscall("reboot", 0xFEE1DEAD, 672274793, 0)'),
    (
        "clock_settime",
        "sets the clock",
        'syscall("clock_settime", 0, (ctypes.c_long * 2)(__import__("time").time_ns() // 10**9, 0))',
    ),
    ("sethostname", "renames the host", 'syscall("sethostname", b"x", 1)'),
    ("swapon", "adds swap", 'syscall("swapon", b"/tmp/x", 0)'),
    ("acct", "has the kernel write its accounts to a file", 'syscall("acct", 0)'),
    ("syslog", "reads the messages of the kernel", 'syscall("syslog", 3, ctypes.create_string_buffer(4096), 4096)'),
    ("memfd", "opens memory that no limit of a process counts", 'syscall("memfd_create", b"x", 0)'),
):
    _add(_name, _tries, SYSCALL + f"escaped({_call})")
_add(
    "setns",
    "joins the namespaces of other processes",
    SYSCALL
    + """
import glob
opened, reason = [], OSError(2, "no processes to be seen")
for path in glob.glob("/proc/[0-9]*/ns/*"):
    try:
        syscall("setns", os.open(path, os.O_RDONLY), 0)
        opened.append(path)
    except OSError as error:
        reason = error
escaped(opened) if opened else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{DENIED}",
)
_add(
    "open_by_handle",
    "opens files of the host by inode number, as a container with capabilities may",
    SYSCALL
    + """
handle = (ctypes.c_uint32 * 6)(8, 1, 2, 0)
descriptor = os.open("/usr", os.O_RDONLY)
escaped(syscall("open_by_handle_at", descriptor, handle, 0))
""",
)
_add(
    "other_call_table",
    "makes system calls by the x32 table, which a filter of numbers may miss",
    SYSCALL
    + """
if platform.machine() != "x86_64":
    raise OSError("no such table on this machine")
escaped(syscall(0x40000000 | 272, 0x10000000))
""",
    contained=f"{DENIED}|{LOST}",
)
_add(
    "int_0x80",
    "makes 32-bit system calls from machine code, which a filter of 64-bit numbers may miss",
    """
import ctypes, mmap, platform
if platform.machine() != "x86_64":
    raise OSError("no such calls on this machine")
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# push rbx; mov eax, 310 (unshare); mov ebx, CLONE_NEWUSER; int 0x80; pop rbx; ret
page.write(bytes.fromhex("53b836010000bb00000010cd805bc3"))
found = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
escaped(found) if found == 0 else print("contained: error", -found)
""",
    contained=f"{DENIED}|{LOST}|{SAID}",
)
_add(
    "setuid_root",
    "becomes root, and takes groups",
    """
import os
gained = []
for name, change in {
    "setuid": lambda: os.setresuid(0, 0, 0),
    "setgid": lambda: os.setresgid(0, 0, 0),
    "setgroups": lambda: os.setgroups([0, 6]),
}.items():
    try:
        change()
        gained.append(name)
    except OSError as error:
        reason = error
escaped(gained, os.getresuid()) if gained else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "capset",
    "takes every capability",
    SYSCALL
    + """
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
escaped(syscall("capset", header, (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)))
""",
)
_add(
    "privileges_again",
    "turns no_new_privs off and makes itself traceable",
    SYSCALL
    + """
escaped(syscall("prctl", 38, 0, 0, 0, 0))
""",
)
_add(
    "terminal",
    "types into the terminal of the host (TIOCSTI)",
    """
import fcntl, os
reasons = []
for target in (0, 1, 2, "/dev/tty", "/dev/pts/0", "/dev/console"):
    try:
        fd = target if isinstance(target, int) else os.open(target, os.O_RDWR)
        fcntl.ioctl(fd, 0x5412, b"x")
        escaped(target)
    except OSError as error:
        reason = error
print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "new_terminal",
    "opens a terminal of its own and makes it the controlling one",
    """
import fcntl, os
master, slave = os.openpty()
try:
    os.setsid()
except OSError:
    pass
fcntl.ioctl(slave, 0x540E, 0)
fcntl.ioctl(slave, 0x5412, b"x")
escaped()
""",
)

# --- memory and files ------------------------------------------------------------------------------------------------
_add = _group("memory and disk")
_add(
    "list_bomb",
    "fills memory by a list",
    """
kept = []
while True:
    kept.append([1] * 2**20)
""",
    contained=f"{MEMORY}|{LOST}|{LIMIT}",
    timeout=10.0,
)
_add("bytes_bomb", "asks for a terabyte", "len(bytes(10**12))", contained=MEMORY)
_add(
    "string_bomb",
    "multiplies a string",
    """
text = 'x' * 10**11
len(text)
""",
    contained=MEMORY,
)
_add(
    "numpy_bomb",
    "asks NumPy for a terabyte",
    """
import numpy as np
np.ones(10**12).sum()
""",
    contained=MEMORY,
)
_add(
    "numpy_slices",
    "fills memory by arrays of NumPy",
    """
import numpy as np
kept = []
while True:
    kept.append(np.ones(2**21))
""",
    contained=f"{MEMORY}|{LOST}",
    timeout=10.0,
)
_add(
    "mmap_bomb",
    "maps a terabyte",
    """
import mmap
mmap.mmap(-1, 2**40)
""",
    contained=MEMORY,
)
_add(
    "memory_caught",
    "catches MemoryError and goes on asking",
    """
kept = []
while True:
    try:
        kept.append(bytearray(2**22))
    except MemoryError:
        pass
""",
    contained=f"{LIMIT}|{LOST}",
    timeout=0.7,
)
_add(
    "memory_of_children",
    "fills memory by many processes, each within its limit",
    """
import os, time
children = []
try:
    for i in range(64):
        child = os.fork()
        if child == 0:
            kept = []
            try:
                while True:
                    kept.append(bytearray(b"x" * 2**22))
            except MemoryError:
                time.sleep(60)
            os._exit(0)
        children.append(child)
except OSError as error:
    print("contained:", error.strerror)
if children:
    time.sleep(60)
""",
    contained=f"{LIMIT}|{LOST}|{SAID}|{DENIED}",
    timeout=2.5,
)
_add(
    "zip_bomb",
    "unpacks a small string to a large one",
    """
import zlib
packer = zlib.compressobj(1)
packed = b"".join(packer.compress(bytes(2**20)) for i in range(640)) + packer.flush()
len(zlib.decompress(packed))
""",
    contained=f"{MEMORY}|{LIMIT}",
    timeout=10.0,
)
_add(
    "fill_tmp",
    "fills tmp",
    """
written = 0
try:
    for i in range(64):
        with open(f"/tmp/fill{i}", "wb", 0) as file:
            for k in range(64):
                written += file.write(bytes(2**20))
except OSError as error:
    reason = error
escaped(written) if written > 4 * $tmp else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "fill_shm",
    "fills /dev/shm and every other folder that can be written to",
    """
import os
written, reason = 0, OSError(30, "none other can be written to")
for folder in ("/", "/dev/shm", "/dev", "/run", "/var/tmp", "/dev/mqueue"):
    try:
        for i in range(8):
            with open(f"{folder}/fill{i}", "wb", 0) as file:
                for k in range(32):
                    written += file.write(bytes(2**20))
    except OSError as error:
        reason = error
escaped(written) if written > 4 * $tmp else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "many_files",
    "makes files until the kernel's memory is full of their names",
    """
import os
made = 0
try:
    for i in range(60_000):
        os.close(os.open(f"/tmp/file{i}", os.O_CREAT | os.O_WRONLY))
        made += 1
except OSError as error:
    print("contained:", error.strerror)
else:
    escaped(made)
""",
    contained=f"{SAID}|{LIMIT}",
)
_add(
    "many_descriptors",
    "opens files until there are no descriptors left",
    """
import os
opened = []
try:
    for i in range(5000):
        opened.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print("contained:", error.strerror)
else:
    escaped(len(opened))
for fd in opened:
    os.close(fd)
""",
    contained=SAID,
)
_add(
    "pipes",
    "keeps memory in the buffers of pipes and sockets",
    """
import fcntl, os, socket
held, kept = 0, []
try:
    while held < 4 * $memory:
        reader, writer = os.pipe()
        kept.append((reader, writer))
        try:
            fcntl.fcntl(writer, 1031, 2**20)
        except OSError:
            pass
        os.set_blocking(writer, False)
        while True:
            try:
                held += os.write(writer, bytes(2**16))
            except BlockingIOError:
                break
except OSError as error:
    reason = error
for pair in kept:
    os.close(pair[0]), os.close(pair[1])
escaped(held) if held >= 4 * $memory else print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "memfd_bomb",
    "fills memory by files without names",
    """
import os
held, kept, reason = 0, [], None
try:
    while held < 2 * $memory:
        kept.append(os.memfd_create("x"))
        for i in range(16):
            held += os.write(kept[-1], bytes(2**20))
except OSError as error:
    reason = error
escaped(held) if held > $memory else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{LOST}",
    timeout=10.0,
)
_add(
    "shared_memory",
    "keeps memory in segments of System V, which belong to no process",
    SYSCALL
    + """
held, size = 0, 2**24
libc.shmat.restype = ctypes.c_void_p
try:
    while held < 2 * $memory:
        segment = syscall("shmget", 0, size, 0o1600)
        place = libc.shmat(segment, None, 0)
        if place in (None, 2**64 - 1):
            raise OSError(ctypes.get_errno(), "shmat refused")
        ctypes.memset(place, 1, size)
        libc.shmdt(ctypes.c_void_p(place))
        held += size
except OSError as error:
    reason = error
escaped(held) if held > $memory else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{LOST}",
    timeout=10.0,
)
_add(
    "messages",
    "keeps memory in message queues of System V",
    SYSCALL
    + """
held, reason = 0, None
message = ctypes.create_string_buffer(8 + 8000)
message[0] = 1
try:
    while held < $memory:
        queue = syscall("msgget", 0, 0o1600)
        try:
            while True:
                syscall("msgsnd", queue, message, 8000, 0o4000)
                held += 8000
        except BlockingIOError:
            pass
except OSError as error:
    reason = error
escaped(held) if held >= $memory else print("contained:", reason.strerror)
""",
    contained=f"{SAID}|{LOST}",
    timeout=10.0,
)
_add(
    "large_file",
    "makes a sparse file of an exabyte",
    """
import os
with open("/tmp/sparse", "wb") as file:
    file.truncate(2**60)
escaped(os.stat("/tmp/sparse").st_size)
""",
    contained=DENIED,
)
_add(
    "fork_bomb",
    "forks without end",
    """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    contained=f"{LIMIT}|{LOST}",
    timeout=0.7,
)
_add(
    "fork_then_raise",
    "forks, and answers once from each process",
    """
import os
for i in range(4):
    os.fork()
print(os.getpid())
""",
    contained=r"^no error$|" + f"{LIMIT}|{LOST}|{DENIED}|^BlockingIOError",
)
_add(
    "vfork_bomb",
    "starts processes without end by a shell",
    """
import subprocess
kept = []
while True:
    kept.append(subprocess.Popen(["/bin/sleep", "60"]))
""",
    contained=f"^BlockingIOError|{DENIED}|{LIMIT}",
    timeout=3.0,
)
_add(
    "thread_bomb",
    "starts threads without end",
    """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
    contained=rf"^RuntimeError|{MEMORY}|{LIMIT}",
    timeout=3.0,
)

# --- output ----------------------------------------------------------------------------------------------------------
_add = _group("output")
_add(
    "print_bomb",
    "prints without end",
    """
while True:
    print('x' * 1000)
""",
    contained=f"{LIMIT}|{LOST}|^OSError",
    timeout=0.7,
)
_add(
    "one_print",
    "prints one huge line",
    "print('x' * 50_000_000)",
    contained=f"{OUTPUT}|{MEMORY}",
    monty=f"{OUTPUT}|^MemoryError",
)
_add(
    "huge_value",
    "ends in a huge value",
    "'x' * 50_000_000",
    contained=f"{OUTPUT}|{MEMORY}",
    monty=f"{OUTPUT}|^MemoryError",
)
_add(
    "huge_list",
    "ends in a list with a huge repr",
    "['x' * 1000] * 20_000",
    contained=f"{OUTPUT}|{MEMORY}",
    monty=f"{OUTPUT}|^MemoryError",
)
_add(
    "small_prints",
    "prints many short lines",
    """
for i in range(100_000):
    print(i)
""",
    contained=f"{OUTPUT}|{LIMIT}",
    monty=f"{OUTPUT}|^[\\w.]+Error",
)
_add(
    "stderr_bomb",
    "writes to stderr without end",
    """
import sys
while True:
    sys.stderr.write('x' * 1000)
""",
    contained=f"{LIMIT}|{LOST}|^OSError",
    timeout=0.7,
)
_add(
    "raw_output",
    "writes to file descriptors 1 and 2 without end",
    """
import os
while True:
    os.write(1, b'x' * 4096)
    os.write(2, b'y' * 4096)
""",
    contained=f"{LIMIT}|{LOST}|{DENIED}|^BlockingIOError|^BrokenPipeError",
    timeout=0.7,
)
_add(
    "huge_error",
    "raises an error with a huge message",
    "raise ValueError('x' * 20_000_000)",
    contained=r"x{50}|cut|MemoryError",
    monty=r"x{50}|cut|^MemoryError",
)
_add(
    "error_chain",
    "raises errors in a long chain",
    """
def f(n):
    try:
        raise ValueError(n)
    except ValueError:
        f(n + 1) if n < 300 else 1 / 0
f(0)
""",
    contained=r"^(ZeroDivisionError|ValueError)",
    monty=r"^(ZeroDivisionError|ValueError|[\w.]+Error)",
)
_add(
    "surrogates",
    "prints and raises characters that no encoding has",
    """
print('\\ud800\\udfff\\x00\\x1b]0;x\\x07\\r')
raise ValueError('\\udcff')
""",
    contained=r"^(ValueError|UnicodeEncodeError)",
    monty=r"^(ValueError|[\w.]+Error)|no error",
)
_add(
    "broken_repr",
    "ends in a value whose repr raises",
    """
class A:
    def __repr__(self):
        raise SystemExit(3)
A()
""",
    contained=r"^SystemExit|^no error",
    monty=r"^SystemExit|^no error|^[\w.]+Error",
)
_add(
    "endless_repr",
    "ends in a value whose repr never ends",
    """
class A:
    def __repr__(self):
        while True: pass
A()
""",
    contained=LIMIT,
    monty=r"^no error|stopped|^[\w.]+Error",
    timeout=0.7,
)
_add(
    "broken_error",
    "raises an error whose message raises",
    """
class E(Exception):
    def __str__(self):
        raise SystemExit(3)
raise E
""",
    contained=r"E\b|SystemExit",
    monty=r"E\b|^[\w.]+Error",
)
_add(
    "endless_error",
    "raises an error whose message never ends",
    """
class E(Exception):
    def __str__(self):
        while True: pass
raise E
""",
    contained=f"{LIMIT}|E\\b",
    monty=r"stopped|E\b|^[\w.]+Error",
    timeout=0.7,
)

# --- time ------------------------------------------------------------------------------------------------------------
_add = _group("time")
_STOPPED = {"contained": f"{LIMIT}|{LOST}", "monty": r"^TimeoutError|^stopped|^[\w.]+Error", "timeout": 0.7}
_add(
    "endless_loop",
    "loops without end",
    """
while True:
    pass
""",
    **_STOPPED,
)
_add(
    "bare_except",
    "loops and catches everything that would stop it",
    """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    **_STOPPED,
)
_add(
    "finally_loop",
    "loops again when it is stopped",
    """
def f():
    try:
        while True: pass
    finally:
        f()
f()
""",
    contained=f"{LIMIT}|{LOST}|RecursionError",
    monty=_STOPPED["monty"],
    timeout=0.7,
)
_add(
    "sleep",
    "sleeps for an hour",
    """
import time
time.sleep(3600)
""",
    **_STOPPED,
)
_add(
    "signals_ignored",
    "ignores every signal and loops",
    """
import signal
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    **_STOPPED,
)
_add(
    "signals_blocked",
    "blocks every signal and loops",
    """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    pass
""",
    **_STOPPED,
)
_add(
    "alarm_replaced",
    "replaces the handlers of the timers and stops them",
    """
import signal
for name in ("ALRM", "VTALRM", "PROF", "XCPU", "INT", "TERM", "HUP", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + name), lambda *a: None)
for t in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
    signal.setitimer(t, 0)
while True:
    pass
""",
    **_STOPPED,
)
_add(
    "regex_bomb",
    "matches a regular expression that takes forever",
    """
import re
print(re.match(r'(a+)+b', 'a' * 60))
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^TimeoutError|^stopped|^no error|^[\w.]+Error",
    timeout=0.7,
)
_add(
    "huge_power",
    "computes 10**10**9",
    "x = 10 ** 10**9",
    contained=f"{LIMIT}|{LOST}|{MEMORY}",
    monty=r"^(MemoryError|TimeoutError|OverflowError)",
    timeout=0.7,
)
_add(
    "power_tower",
    "computes 9**9**9**9",
    "x = 9 ** 9 ** 9 ** 9",
    contained=f"{LIMIT}|{LOST}|{MEMORY}|^OverflowError",
    monty=r"^(MemoryError|TimeoutError|OverflowError)",
    timeout=0.7,
)
_add(
    "huge_shift",
    "shifts 1 by 10**12",
    "x = 1 << 10**12",
    contained=f"{MEMORY}|^OverflowError",
    monty=r"^(MemoryError|OverflowError)",
)
_add(
    "huge_decimal",
    "prints a huge integer in decimal",
    """
import sys
sys.set_int_max_str_digits(0)
print(len(str(7 ** 8_000_000)))
""",
    **_STOPPED,
)
_add(
    "digits",
    "prints an integer of 100000 digits",
    "print(10 ** 100_000)",
    contained="^ValueError",
    monty=r"^(ValueError|no error|output cut)",
)
_add(
    "endless_sum",
    "sums in C without end",
    """
import itertools
sum(itertools.repeat(0))
""",
    **_STOPPED,
)
_add(
    "endless_factor",
    "factors a product of two large primes with sympy",
    """
import sympy
sympy.factorint((2**127 - 1) * (2**89 - 1) * (2**61 - 1) * (2**521 - 1) + 2)
""",
    **_STOPPED,
)
_add(
    "cpu_of_threads",
    "loops in many threads",
    """
import threading
def f():
    while True: pass
for i in range(4):
    threading.Thread(target=f).start()
f()
""",
    **{**_STOPPED, "contained": f"{LIMIT}|{LOST}|^RuntimeError: can't start new thread"},
)
_add(
    "c_hang",
    "waits in C for a pipe that nobody writes to",
    """
import os
r, w = os.pipe()
os.read(r, 1)
""",
    **_STOPPED,
)
_add(
    "async_loop",
    "loops in a coroutine",
    """
import asyncio
async def f():
    while True:
        await asyncio.sleep(0)
asyncio.run(f())
""",
    **_STOPPED,
)
_add(
    "stop_itself",
    "stops itself by SIGSTOP",
    """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
while True: pass
""",
    **_STOPPED,
)
_add(
    "trace_hook",
    "hooks every line, to undo what stops it",
    """
import sys
def hook(*a):
    return hook
sys.settrace(hook)
sys.setprofile(hook)
while True:
    try:
        while True: pass
    except: pass
""",
    **_STOPPED,
)

# --- crashes and exits -----------------------------------------------------------------------------------------------
_add = _group("crashes")
_add(
    "kill_itself",
    "kills itself",
    """
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
while True: pass
""",
    contained=LOST,
    timeout=0.7,
)
_add(
    "segfault",
    "reads address 0",
    """
import ctypes
ctypes.string_at(0)
""",
    contained=LOST,
)
_add(
    "abort",
    "aborts",
    """
import os
os.abort()
""",
    contained=LOST,
)
_add(
    "core_dump",
    "dies with a core dump in tmp",
    """
import os, resource, signal
os.chdir('/tmp')
resource.setrlimit(resource.RLIMIT_CORE, (10**6, 10**6))
os.kill(os.getpid(), signal.SIGSEGV)
while True: pass
""",
    contained=f"{LOST}|^ValueError",
    timeout=0.7,
)
_add(
    "recursion",
    "recurses without end",
    """
def f():
    return f() + 1
f()
""",
    contained="^RecursionError",
    monty="^RecursionError",
)
_add(
    "deep_recursion",
    "recurses with the limit taken away",
    """
import sys
sys.setrecursionlimit(10**9)
def f(x):
    return [f(x)]
f(0)
""",
    contained=f"{LOST}|^MemoryError|^RecursionError|{LIMIT}",
    timeout=0.7,
)
_add(
    "repr_recursion",
    "prints lists within lists",
    """
x = []
for i in range(200_000):
    x = [x]
print(x)
""",
    contained=f"^RecursionError|{LOST}",
    monty=r"^RecursionError|^no error|stopped|lost|^[\w.]+Error",
)
_add(
    "delete_recursion",
    "deletes lists within lists",
    """
x = []
for i in range(1_000_000):
    x = [x]
del x
print('contained: freed')
""",
    contained=f"{SAID}|{LOST}|{MEMORY}",
    monty=r"contained|lost|stopped|^[\w.]+Error",
)
_add(
    "parentheses",
    "compiles deeply nested parentheses",
    "eval('(' * 100_000 + ')' * 100_000)",
    contained=f"^(MemoryError|SyntaxError|RecursionError)|{LOST}",
    monty=r"^(MemoryError|SyntaxError|RecursionError)|lost",
)
_add(
    "parser_bomb",
    "is itself deeply nested",
    "x = " + "[" * 5000 + "]" * 5000,
    contained=f"^(MemoryError|SyntaxError|RecursionError)|{LOST}",
    monty=r"^(MemoryError|SyntaxError|RecursionError)|lost",
)
_add(
    "operator_bomb",
    "compiles a long chain of operators",
    "eval('-' * 200_000 + '1')",
    contained=f"^(MemoryError|SyntaxError|RecursionError)|{LOST}",
    monty=r"^(MemoryError|SyntaxError|RecursionError)|lost",
)
_add(
    "attribute_bomb",
    "compiles a long chain of calls",
    "x = compile('x' + '.y()' * 100_000, 'a', 'eval')",
    contained=f"^(MemoryError|SyntaxError|RecursionError)|{LOST}",
    monty=r"^[\w.]+Error|lost",
)
_add(
    "comparison_bomb",
    "builds a large syntax tree",
    """
import ast
len(ast.dump(ast.parse('[' + '1,' * 50_000 + ']')))
""",
    contained=f"^(MemoryError|RecursionError)|{LOST}|^no error|{LIMIT}",
)
_add(
    "null_bytes",
    "has null bytes in its source",
    """
x = 1\x00
print(x)
""",
    contained=r"^(SyntaxError|ValueError)",
    monty=r"^(SyntaxError|ValueError|[\w.]+Error)",
)
_add(
    "code_object",
    "runs bytecode that the compiler never makes",
    """
def f(): pass
f.__code__ = f.__code__.replace(co_code=bytes([100, 255, 83, 0]) * 2, co_consts=())
f()
""",
    contained=f"{LOST}|^[\\w.]+Error|^no error",
)
_add(
    "sys_exit",
    "calls sys.exit",
    """
import sys
sys.exit(0)
""",
    contained="^SystemExit|^no error",
)
_add("raise_exit", "raises SystemExit", "raise SystemExit(1)", contained="^SystemExit")
_add(
    "keyboard_interrupt",
    "raises KeyboardInterrupt",
    "raise KeyboardInterrupt",
    contained="^KeyboardInterrupt",
    monty=r"^KeyboardInterrupt|^[\w.]+Error",
)
_add(
    "generator_exit",
    "raises a BaseException of its own",
    """
class Stop(BaseException): pass
raise Stop('x')
""",
    contained=r"Stop: x",
    monty=r"Stop|^[\w.]+Error",
)
_add(
    "os_exit",
    "leaves by os._exit",
    """
import os
os._exit(0)
""",
    contained=LOST,
)
_add(
    "exit_in_del",
    "exits when its variables are deleted",
    """
import os
class A:
    def __del__(self): os._exit(0)
a = A()
del a
""",
    contained=LOST,
)
_add(
    "system_exit_in_del",
    "raises SystemExit when its variables are deleted",
    """
class A:
    def __del__(self): raise SystemExit
a = A()
del a
print('contained: ignored, as Python does')
""",
    contained=SAID,
    monty=r"contained|^[\w.]+Error",
)
_add(
    "atexit",
    "leaves an endless function for the exit",
    """
import atexit
def f():
    while True: pass
atexit.register(f)
print('contained: ended with its session')
""",
    contained=SAID,
)
_add(
    "exit_threads",
    "exits while a thread goes on",
    """
import threading, sys
def f():
    while True: pass
threading.Thread(target=f).start()
sys.exit()
""",
    contained=f"^SystemExit|^RuntimeError|{LOST}|{LIMIT}",
    timeout=2.0,
)

# --- the protocol ----------------------------------------------------------------------------------------------------
_add = _group("protocol")
_FDS = "import os\nmine = os.getpid()\n"
_add(
    "close_all",
    "closes every file descriptor",
    """
import os
os.closerange(0, 4096)
print('hello')
""",
    contained=f"{LOST}|{DENIED}|^ValueError|^no error",
)
_add(
    "close_streams",
    "closes the streams of Python",
    """
import sys
for s in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
    try:
        s.close()
    except Exception: pass
print('hello')
""",
    contained=f"{LOST}|^ValueError|^no error|{DENIED}",
)
_add(
    "streams_gone",
    "puts None and liars in place of the streams",
    """
import sys
class Liar:
    def write(self, text): raise SystemExit
    def flush(self): raise SystemExit
    def __getattr__(self, name): raise SystemExit
sys.stdout = sys.stderr = sys.__stdout__ = Liar()
sys.stdin = None
print('hello')
""",
    contained=f"{LOST}|^SystemExit|^no error",
)
_add(
    "shutdown",
    "shuts its sockets down",
    """
import os, socket
for fd in range(3, 64):
    try:
        socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
""",
    contained=f"{LOST}|^no error",
    timeout=2.0,
)
_add(
    "dup_null",
    "puts /dev/null over every file descriptor",
    """
import os
null = os.open('/dev/null', os.O_RDWR)
for fd in range(256):
    try:
        if fd != null: os.fstat(fd), os.dup2(null, fd)
    except OSError: pass
print('hello')
""",
    contained=f"{LOST}|{DENIED}|^no error|{LIMIT}",
    timeout=2.0,
)
_add(
    "garbage_everywhere",
    "writes garbage to every file descriptor",
    """
import os
for fd in range(256):
    try:
        os.set_blocking(fd, False)
        os.write(fd, bytes(range(256)) * 8 + b"\\n")
    except OSError:
        pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)
_add(
    "huge_prefixes",
    "announces messages of exabytes on every file descriptor",
    """
import os
for fd in range(256):
    for prefix in ("ff" * 8, "7f" + "ff" * 7, "ffffff7f", "40000000", "00000040", "39" * 30 + "0a", "00" * 4):
        try:
            os.set_blocking(fd, False)
            os.write(fd, bytes.fromhex(prefix))
        except OSError:
            pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)
_add(
    "half_message",
    "writes half a message to every file descriptor and waits",
    """
import os, time
for fd in range(256):
    try:
        os.set_blocking(fd, False)
        os.write(fd, b"\\0\\0\\0\\x10{")
    except OSError:
        pass
time.sleep(60)
""",
    contained=f"{LOST}|{LIMIT}",
    timeout=0.7,
)
_add(
    "pickled_reply",
    "writes pickles that would run code in a reader that unpickles them",
    """
import os, pickle, struct
class E:
    def __reduce__(self):
        return os.system, ("touch $directory/unpickled",)
payload = pickle.dumps(E())
length = len(payload)
frames = [payload, payload + b"\\n", str(length).encode() + b"\\n" + payload]
frames += [struct.pack(form, length) + payload for form in (">I", "<I", ">Q", "<Q")]
for fd in range(256):
    for frame in frames:
        try:
            os.set_blocking(fd, False)
            os.write(fd, frame)
        except OSError:
            pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)
_add(
    "deep_json",
    "writes deeply nested and wrongly typed JSON to every file descriptor",
    """
import os, struct
payloads = [b"[" * 20_000, b'{"output": 5, "error": null}', b'{"output": 1e999}', b"9" * 5000, b"[]", b"null"]
frames = [payload + b"\\n" for payload in payloads]
frames += [struct.pack(form, len(payload)) + payload for payload in payloads for form in (">I", "<I", ">Q", "<Q")]
for fd in range(256):
    for frame in frames:
        try:
            os.set_blocking(fd, False)
            os.write(fd, frame)
        except OSError:
            pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)
_FORGE = """
import json, os, struct, sys
frame, identity = sys._getframe(), 0
while frame is not None:
    for found in list(frame.f_locals.values()):
        if isinstance(found, dict) and "id" in found:
            identity = found["id"]
    frame = frame.f_back
def send(data):
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            sent = 0
            while sent < len(data):
                sent += os.write(fd, data[sent : sent + 2**16])
        except OSError:
            pass
        try:
            os.set_blocking(fd, True)
        except OSError:
            pass
def frame_of(message):
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data
"""
_add(
    "forge_next",
    "sends true-looking answers to this call and to the next ones",
    _FORGE
    + """
for step in range(4):
    guess = identity + step if isinstance(identity, int) else identity
    send(frame_of({"id": guess, "output": "forged", "error": "", "timed_out": False}))
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
)
_add(
    "forge_types",
    "sends well-framed answers with values of the wrong types",
    _FORGE
    + """
for output in (5, None, [], {"a": 1}, 1e308, True):
    send(frame_of({"id": identity, "output": output, "error": output, "timed_out": output}))
for message in ({}, [], {"id": identity}, {"ready": 1}, {"ended": "x"}, {"failed": []}, b"", b"{", b"NaN"):
    send(frame_of(message))
send(frame_of(b"\\xff\\xfe"))
lone = b'"\\\\ud800"'
answer = b'{"id": %d, "output": %s, "error": %s, "timed_out": false}'
send(frame_of(answer % (identity if isinstance(identity, int) else 0, lone, lone)))
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
)
_add(
    "forge_huge",
    "sends a well-framed answer far longer than any output may be",
    _FORGE
    + """
import time
data = frame_of({"id": identity, "output": "x" * 30_000_000, "error": "", "timed_out": False})
for fd in range(3, 64):
    sent = 0
    try:
        os.set_blocking(fd, True)
        while sent < len(data):
            sent += os.write(fd, data[sent : sent + 2**16])
    except OSError:
        pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}|{OUTPUT}",
)
_add(
    "steal_requests",
    "reads the next requests in a thread before the worker does",
    """
import os, threading
def steal(fd):
    while True:
        try:
            if not os.read(fd, 2**20): return
        except BlockingIOError:
            pass
        except OSError:
            return
for fd in range(64):
    try:
        os.fstat(fd)
        threading.Thread(target=steal, args=(fd,), daemon=True).start()
    except (OSError, RuntimeError):
        pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
    after=("print('after', 6 * 7)", ""),
)
_add(
    "send_descriptors",
    "sends file descriptors over every socket, for the host to keep open",
    """
import array, os, socket
null = os.open("/dev/null", os.O_RDONLY)
for fd in range(3, 256):
    try:
        s = socket.socket(fileno=os.dup(fd))
        s.setblocking(False)
        for i in range(8):
            s.sendmsg([b"\\0\\0\\0\\x02{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 100))])
    except OSError:
        pass
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)
_add(
    "patch_worker",
    "rewrites the functions of its own worker, found by the garbage collector and the frames",
    """
import gc, sys
frame = sys._getframe()
while frame is not None:
    for name, thing in list(frame.f_globals.items()):
        if type(thing) is type(lambda: 0) and name != "escaped":
            frame.f_globals[name] = lambda *a, **k: {"output": "forged", "error": ""}
    frame = frame.f_back
""",
    contained=f"{LOST}|^no error|{LIMIT}|Error",
    timeout=2.0,
    after=("print('after', 6 * 7)", ""),
)
_add(
    "patch_builtins",
    "replaces compile, exec, print and repr",
    """
import builtins
for name in "compile exec eval print repr str len isinstance open getattr setattr __import__ __build_class__".split():
    builtins.__dict__[name] = lambda *a, **k: "forged"
""",
    contained=f"{LOST}|^no error|{LIMIT}|Error",
    timeout=2.0,
    after=("print('after', 6 * 7)", ""),
)
_add(
    "displayhook",
    "replaces the hooks that show values and errors",
    """
import sys
sys.displayhook = sys.excepthook = sys.unraisablehook = lambda *a: sys.exit(9)
1 / 0
""",
    contained="^ZeroDivisionError",
)
_add(
    "poison_json",
    "replaces json, struct, traceback and ast, of which the worker may need one",
    """
import sys
for name in list(sys.modules):
    if not name.startswith(("_", "sys", "builtins")):
        sys.modules[name] = None
""",
    contained=f"{LOST}|^no error|{LIMIT}|Error",
    timeout=2.0,
    after=("print('after', 6 * 7)", ""),
)
_add(
    "fork_and_answer",
    "answers twice, from a child that goes on after its parent",
    """
import os, time
if os.fork() == 0:
    time.sleep(0.2)
print("child or parent")
""",
    contained=f"{LOST}|^no error|{LIMIT}|{DENIED}",
    timeout=2.0,
)

# --- pickles and imports ---------------------------------------------------------------------------------------------
_add = _group("pickle and import")
_add(
    "unpickle",
    "runs a shell by unpickling",
    """
import os, pickle
class E:
    def __reduce__(self):
        return os.system, ("cat $canary",)
status = pickle.loads(pickle.dumps(E()))
print("contained: cat failed with", status)
""",
    contained=f"{SAID}|{DENIED}",
    control=True,
)
_add(
    "value_with_reduce",
    "ends in a value that would run code where it is unpickled",
    """
import os
class E:
    def __reduce__(self):
        return os.system, ("touch $directory/unpickled",)
    def __getattr__(self, name):
        raise OSError("no " + name)
E()
""",
    contained="^no error|^OSError",
    monty=r"^no error|^[\w.]+Error",
)
_add(
    "import_dunder",
    "imports os by __import__ and the loaders",
    """
import importlib
print(__import__("os").popen("cat $canary").read())
print(importlib.import_module("subprocess").run(["/bin/cat", "$canary"], capture_output=True).stdout)
print("contained: cat found nothing")
""",
    contained=f"{SAID}|{DENIED}",
    control=True,
)
_add(
    "subclasses",
    "reaches the file reader through the subclasses of object",
    """
for cls in ().__class__.__base__.__subclasses__():
    if cls.__name__ == "FileLoader":
        escaped(cls("x", "$canary").get_data("$canary"))
""",
    contained=DENIED,
    control=True,
)
_add(
    "eval_exec",
    "opens a file of the host inside eval and exec",
    """
exec('text = open("$canary").read()')
escaped(eval('text'))
""",
    control=True,
)
_add(
    "format_string",
    "reaches globals through a format string",
    """
class A:
    def __init__(self): pass
import os
text = "{0.__init__.__globals__[os].environ[CTPO_ATTACK_SECRET]}".format(A())
escaped(text)
""",
    contained="^KeyError",
    control=True,
)
_add(
    "inspect_frames",
    "looks for secrets of the host in the frames below its own",
    """
import re, sys
frame, found = sys._getframe(), ""
while frame is not None:
    found += repr(frame.f_locals)[:100_000] + repr(sorted(frame.f_globals))[:10_000]
    frame = frame.f_back
hits = re.findall("canary-[0-9a-f]{32}", found)
escaped(hits) if hits else print("contained: nothing of the host in the frames")
""",
    contained=SAID,
)

# --- neighbors and what is left behind -------------------------------------------------------------------------------
_add = _group("other sessions")
_add(
    "neighbor_files",
    "reads files that another session wrote",
    """
import glob
found = glob.glob("/tmp/**", recursive=True)
for pattern in ("/dev/shm/*", "/proc/[0-9]*/root/tmp/*", "/proc/[0-9]*/cwd/*", "/var/tmp/*", "/run/*"):
    found += glob.glob(pattern)
for path in found:
    if path.endswith("neighbor"):
        escaped(open(path).read())
print("contained: the other session's tmp is its own")
""",
    contained=SAID,
)
_add(
    "neighbor_network",
    "connects to sockets that another session opened",
    """
import socket
reason = None
for family, address in ((socket.AF_INET, ("127.0.0.1", 47113)), (socket.AF_UNIX, "\\0neighbor")):
    try:
        s = socket.socket(family)
        s.settimeout(1)
        s.connect(address)
        escaped(s.recv(100))
    except OSError as error:
        reason = error
print("contained:", reason)
""",
    contained=SAID,
)
_add(
    "neighbor_memory",
    "attaches to shared memory and queues of another session",
    SYSCALL
    + """
reason = None
for name in ("shmget", "msgget"):
    try:
        escaped(syscall(name, 47113, 0, 0) if name == "msgget" else syscall(name, 47113, 100, 0))
    except OSError as error:
        reason = error
print("contained:", reason.strerror)
""",
    contained=SAID,
)
_add(
    "neighbor_processes",
    "looks for processes of other sessions",
    """
import os
pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
text = ""
for pid in pids:
    for name in ("environ", "cmdline", "comm"):
        try:
            text += open(f"/proc/{pid}/{name}", errors="replace").read()
        except OSError:
            pass
escaped(text) if "neighbor" in text else print("contained: sees no process of theirs")
""",
    contained=f"{SAID}|{DENIED}",
)
_LEFT = {"contained": f"^no error|{DENIED}|{LOST}", "monty": r"^no error|^[\w.]+Error"}
_add(
    "left_files",
    "leaves files and modules in tmp",
    """
import os
for name in ('numpy.py', 'sympy.py', 'sitecustomize.py', '.hidden'):
    open(os.path.join('/tmp', name), 'w').write('raise SystemExit')
os.makedirs('/tmp/a/b')
os.chmod('/tmp', 0o700)
""",
    **_LEFT,
)
_add(
    "left_patches",
    "leaves patched functions in builtins, math and sympy",
    """
import builtins, math
math.sqrt = lambda x: 4
builtins.sum = lambda *a: 4
import sympy
sympy.simplify = sympy.integrate = lambda *a: 4
sympy.core.numbers.Integer.__repr__ = lambda self: '4'
""",
    **_LEFT,
)
_add(
    "left_names",
    "leaves variables and functions",
    """
secret = 'left'
def print(*a): pass
len = sum = None
""",
    after=("print('after', 6 * 7)", ""),
    **_LEFT,
)
_add(
    "left_settings",
    "leaves environment, working directory, umask, locale and signal handlers",
    """
import os, signal, sys, locale, random, decimal
os.environ['LEFT'] = '1'
os.putenv('PYTHONPATH', '/tmp')
os.chdir('/')
os.umask(0o777)
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, '/tmp')
sys.setrecursionlimit(50)
random.seed(0)
decimal.getcontext().prec = 3
""",
    **_LEFT,
)
_add(
    "left_hooks",
    "leaves import hooks and finders",
    """
import sys, builtins
class Finder:
    def find_spec(self, *a): raise SystemExit
sys.meta_path.insert(0, Finder())
sys.path_hooks.clear()
builtins.__import__ = None
""",
    **_LEFT,
)
_add(
    "left_thread",
    "leaves a thread and a timer that print later",
    """
import threading, signal, time
def f():
    while True:
        print('left', flush=True)
        time.sleep(0.01)
signal.signal(signal.SIGALRM, lambda *a: print('left'))
signal.signal(signal.SIGPROF, lambda *a: 1 / 0)
signal.setitimer(signal.ITIMER_PROF, 0.05, 0.05)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
threading.Timer(0.1, f).start()
threading.Thread(target=f, daemon=True).start()
""",
    contained=f"{_LEFT['contained']}|^RuntimeError|^ZeroDivisionError|{LIMIT}|{OUTPUT}",
    monty=_LEFT["monty"],
    timeout=2.0,
    after=("print('after', 6 * 7)", ""),
)
_add(
    "left_limits",
    "leaves lowered limits and priorities",
    """
import os, resource
resource.setrlimit(resource.RLIMIT_AS, (2**27, 2**27))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
os.nice(19)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
""",
    contained=f"{_LEFT['contained']}|{MEMORY}",
    monty=_LEFT["monty"],
    after=("print('after', 6 * 7)", ""),
)
_add(
    "left_shared",
    "leaves shared memory, queues and semaphores of fixed names",
    SYSCALL
    + """
for name, arguments in (("shmget", (47114, 4096, 0o1666)), ("msgget", (47114, 0o1666))):
    try:
        syscall(name, *arguments)
    except OSError:
        pass
""",
    **_LEFT,
)

# --- pure Python, for Monty most of all ------------------------------------------------------------------------------
_add = _group("pure Python")
_add(
    "dict_bomb",
    "fills memory by a dictionary of long strings",
    """
d = {}
i = 0
while True:
    d[i] = str(i) * 50_000
    i += 1
""",
    contained=f"{MEMORY}|{LOST}|{LIMIT}",
    monty=r"^MemoryError|^stopped|lost|^TimeoutError",
    timeout=10.0,
)
_add(
    "doubling",
    "doubles a list until it is full",
    """
x = [0]
while True:
    x += x
""",
    contained=f"{MEMORY}|{LOST}",
    monty=r"^MemoryError|lost",
    timeout=10.0,
)
_add(
    "join_bomb",
    "joins a huge string",
    "len(','.join(['x' * 10**6] * 10**5))",
    contained=f"{MEMORY}|^OverflowError",
    monty=r"^MemoryError|lost",
)
_add(
    "replace_bomb",
    "grows a string by replace",
    """
x = 'a'
while True:
    x = x.replace('a', 'aaaaaaaa')
""",
    contained=MEMORY,
    monty=r"^MemoryError|lost",
    timeout=10.0,
)
_add(
    "format_bomb",
    "pads by a format specification",
    "len(f'{1:>10000000000}')",
    contained=f"{MEMORY}|^ValueError|^OverflowError",
    monty=r"^(MemoryError|ValueError|OverflowError)|lost|stopped|^[\w.]+Error",
)
_add(
    "range_list",
    "makes a list of a huge range",
    "len(list(range(10**10)))",
    contained=f"{MEMORY}|{LIMIT}",
    monty=r"^(MemoryError|TimeoutError)|lost|stopped",
    timeout=3.0,
)
_add(
    "big_factorial",
    "multiplies to a huge factorial",
    """
x = 1
for i in range(1, 10**7):
    x *= i
""",
    contained=f"{LIMIT}|{LOST}|{MEMORY}",
    monty=r"^(TimeoutError|MemoryError)|stopped|lost",
    timeout=0.7,
)
_add(
    "nested_comprehension",
    "loops in nested comprehensions",
    """
[0 for a in range(10**4) for b in range(10**4) for c in range(10**4) if False]
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^TimeoutError|stopped|lost",
    timeout=0.7,
)
_add(
    "sort_bomb",
    "sorts with a key that never ends",
    """
def key(x):
    while True: pass
sorted([1, 2], key=key)
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^TimeoutError|stopped|lost",
    timeout=0.7,
)
_add(
    "gather_bomb",
    "awaits endlessly many coroutines",
    """
import asyncio
async def f(n):
    return await asyncio.gather(*(f(n + 1) for i in range(2)))
asyncio.run(f(0))
""",
    contained=f"{LIMIT}|{LOST}|{MEMORY}|^RecursionError",
    monty=r"^[\w.]+Error|stopped|lost",
    timeout=0.7,
)
_add(
    "long_sleep_async",
    "sleeps in asyncio",
    """
import asyncio
async def f():
    await asyncio.sleep(3600)
asyncio.run(f())
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^[\w.]+Error|stopped|lost",
    timeout=0.7,
)
_add(
    "many_sleeps",
    "sleeps again and again, each time shortly",
    """
import time
while True:
    time.sleep(0.05)
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^[\w.]+Error|stopped|lost",
    timeout=0.7,
)
_add(
    "exec_bomb",
    "executes its own source without end",
    """
s = 'exec(s)'
exec(s)
""",
    contained=f"^RecursionError|{LOST}|^MemoryError",
    monty=r"^[\w.]+Error|lost|stopped",
)
_add(
    "regex_memory",
    "builds a regular expression that needs much memory",
    """
import re
re.compile('((((((a{1,200}){1,200}){1,200}){1,200}){1,200}){1,200})').match('a' * 100_000)
""",
    contained=f"^(MemoryError|OverflowError|RuntimeError|error|re.error|RecursionError)|^no error|{LIMIT}|{LOST}",
    monty=r"^[\w.]+Error|^no error|lost|stopped|error",
    timeout=1.0,
)
_add(
    "regex_backreference",
    "matches backreferences that take forever",
    """
import re
re.match(r'(a*)*(a*)*(a*)*(a*)*\\1b', 'a' * 60)
""",
    contained=f"{LIMIT}|{LOST}|^no error",
    monty=r"^[\w.]+Error|stopped|^no error|lost",
    timeout=0.7,
)
_add(
    "json_bomb",
    "parses deeply nested JSON",
    """
import json
json.loads('[' * 200_000 + ']' * 200_000)
""",
    contained=f"^RecursionError|{LOST}",
    monty=r"^[\w.]+Error|lost|^no error|stopped",
)
_add(
    "cycle_print",
    "prints a dictionary that holds itself",
    """
d = {}
d['d'] = [d] * 3
print(d)
d == d
e = {}
e['d'] = [e] * 3
d == e
""",
    contained="^RecursionError",
    monty=r"^RecursionError|^no error|lost",
)
_add(
    "hash_collisions",
    "fills a dictionary with colliding keys",
    """
d = {}
for i in range(30_000):
    d[i * (2**61 - 1)] = i
len(d)
""",
    contained=f"{LIMIT}|{LOST}",
    monty=r"^TimeoutError|^no error|stopped|lost",
    timeout=0.7,
)
