"""A seccomp filter for model-written Python: a list of the system calls that computing and files in /tmp need.

Everything else fails with EPERM: sockets, processes, threads and programs, namespaces and mounts, tracing, keys, BPF,
io_uring, and whatever a later kernel brings. Another architecture's calls kill.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# Name: number on x86_64, number on aarch64 (None where that architecture has no such call).
_CALLS: dict[str, tuple[int, int | None]] = {
    # Files and directories.
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "dup": (32, 23),
    "dup2": (33, None),
    "sendfile": (40, 71),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "creat": (85, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "readlink": (89, None),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "umask": (95, 166),
    "utime": (132, None),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "getdents64": (217, 61),
    "fadvise64": (221, 223),
    "utimes": (235, None),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    "fchmodat": (268, 53),
    "faccessat": (269, 48),
    "utimensat": (280, 88),
    "fallocate": (285, 47),
    "dup3": (292, 24),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "renameat2": (316, 276),
    "copy_file_range": (326, 285),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "statx": (332, 291),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    # Pipes, waiting, and what is left of sockets: those that are open already, and pairs (see `program`).
    "poll": (7, None),
    "pipe": (22, None),
    "select": (23, None),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "epoll_create": (213, None),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "epoll_pwait": (281, 22),
    "eventfd": (284, None),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "pipe2": (293, 59),
    "epoll_pwait2": (441, 441),
    # Memory.
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    # The process itself: signals, time, limits, identity.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "getpriority": (140, 141),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}
# Calls that are let through for some values of an argument; see `program`.
_IOCTL, _FCNTL, _KILL, _TGKILL, _PRLIMIT = (16, 29), (72, 25), (62, 129), (234, 131), (302, 261)
_SOCKETPAIR, _SENDTO, _RECVFROM, _CLONE3 = (53, 199), (44, 206), (45, 207), (435, 435)
_GETSOCKOPT = (55, 209)
# Extended attributes are said not to be there: functions that copy files go on without them. The twelve calls have
# numbers in a row, from setxattr to fremovexattr.
_XATTR = (range(188, 200), range(5, 17))
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no locks, which files of the host would
# take too.
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)
# SO_TYPE, SO_ERROR, SO_SNDBUF, SO_RCVBUF, SO_PROTOCOL, SO_DOMAIN: not who is at the other end (SO_PEERPIDFD).
_OPTIONS = (3, 4, 7, 8, 38, 39)
_AF_UNIX, _MSG_OOB, _SOL_SOCKET = 1, 1, 1

# Column of the table, AUDIT_ARCH, the least number that belongs to another ABI (x32).
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 0x40000000), "aarch64": (1, 0xC00000B7, None)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def program(pid: int, machine: str | None = None) -> bytes:
    """The filter as classic BPF; signals may go to the process `pid` alone.

    Raises:
        OSError: There is no table for the architecture.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}, only for {', '.join(_ARCHITECTURES)}")
    column, architecture, foreign = _ARCHITECTURES[machine]
    denied = _ERRNO | errno.EPERM
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if foreign is not None:
        code += [(_AT_LEAST, 0, 1, foreign), (_RETURN, 0, 0, _KILL_PROCESS)]
    # glibc asks for clone3 first and for clone, which is denied, where there is none.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for number in _XATTR[column]:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.ENOTSUP)]
    # At the level of any other protocol the numbers of the options have other meanings.
    code += [
        (_EQUAL, 0, 3, _GETSOCKOPT[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 8),
        (_EQUAL, 1, 0, _SOL_SOCKET),
        (_RETURN, 0, 0, denied),
        (_LOAD, 0, 0, _NUMBER),
    ]
    # The kernel reads these arguments as 32 bits: the low half, which comes first on both architectures.
    for call, argument, allowed in (
        (_IOCTL, 1, _IOCTLS),
        (_FCNTL, 1, _FCNTLS),
        (_KILL, 0, (pid,)),
        (_TGKILL, 0, (pid,)),
        (_PRLIMIT, 0, (0, pid)),
        (_SOCKETPAIR, 0, (_AF_UNIX,)),
        (_GETSOCKOPT, 2, _OPTIONS),
    ):
        block = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        for value in allowed:
            block += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        block += [(_RETURN, 0, 0, denied)]
        code += [(_EQUAL, 0, len(block), call[column]), *block]
    for call in (_SENDTO, _RECVFROM):  # nothing needs urgent data, and kernels have had holes there
        block = [
            (_LOAD, 0, 0, _ARGUMENTS + 8 * 3),
            (_ANY_BIT, 0, 1, _MSG_OOB),
            (_RETURN, 0, 0, denied),
            (_RETURN, 0, 0, _ALLOW),
        ]
        code += [(_EQUAL, 0, len(block), call[column]), *block]
    for numbers in _CALLS.values():
        permitted = numbers[column]
        if permitted is not None:
            code += [(_EQUAL, 0, 1, permitted), (_RETURN, 0, 0, _ALLOW)]
    code += [(_RETURN, 0, 0, denied)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def install(libc: ctypes.CDLL) -> None:
    """Filter the calling process from here on; needs no privilege after PR_SET_NO_NEW_PRIVS."""
    code = program(os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = Program(len(code) // 8, ctypes.addressof(buffer))
    pr_set_seccomp, mode_filter = 22, 2
    if libc.prctl(pr_set_seccomp, mode_filter, ctypes.byref(argument), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
