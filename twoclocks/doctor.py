"""`twoclocks doctor`: what of this machine, and of a server, differs from what a run needs and the docs assume.

`findings` is pure: facts in, what they mean and what to do out. machine.py and preflight.py find the facts.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from twoclocks.child import default_experiment
from twoclocks.clocks import PAGE, silences
from twoclocks.experiment import Experiment, is_study, load_experiment
from twoclocks.machine import Facts, look
from twoclocks.preflight import ServerFacts, look_at_server

Level = Literal["ok", "note", "problem"]
GIB = 2**30

PYTHON = (3, 11)
FILES_FEW = 4096  # streams of a process that a limit of so many leaves room for are a load worth having
DISK_FEW = 2 * GIB  # a run of 50 million chunks takes 0.5 GB, its report's memory apart
MEMORY_FEW = 1 * GIB  # a report of a small run takes 0.26 of it
STAMP_LATE_S = 0.001  # from the kernel's stamp to the end of the read: 3 us were seen on two shared cores
CLOCK_SLOW_S = 1e-6  # 85 ns were seen with tsc; a source that enters the kernel takes many times that
GOOD_CLOCKS = {"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"}
STOLEN = 0.01
BUSY = 0.2  # of all cores: what others take, the load generator and a server beside it do not have
WOKEN_LATE_S = 0.005  # later than verdict_generator.LATE_SEND_S a request counts as late
REINSTALL = "rm -rf .venv && make install"
SLOW_GOVERNORS = {"powersave", "ondemand", "conservative"}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    level: Level  # note: differs, runs go on; problem: a run would fail, or its figures be bent
    name: str
    found: str
    remedy: str | None = None  # what to do about it


class Told(msgspec.Struct, frozen=True):
    """What the doctor says."""

    findings: list[Finding]
    facts: Facts

    @property
    def exit_code(self) -> int:
        """0; 1 if there is a problem; 3 if the server is one."""
        names = {finding.name for finding in self.findings if finding.level == "problem"}
        return 3 if "server" in names else 1 if names else 0

    def as_json(self) -> str:
        """Findings and facts, for other programs."""
        page = {"exit_code": self.exit_code, "findings": self.findings, "facts": self.facts}
        return msgspec.json.format(msgspec.json.encode(page), indent=1).decode()

    def as_text(self) -> str:
        """The findings for a terminal."""
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:<8}{finding.name:<{width}}  {finding.found}")
            if finding.remedy:
                lines.append(f"{'':<8}{'':<{width}}  -> {finding.remedy}")
        problems, notes = (sum(one.level == level for one in self.findings) for level in ("problem", "note"))
        return "\n".join([*lines, "", f"{_count(problems, 'problem')}, {_count(notes, 'note')}."])


def doctor(options: Namespace) -> Told:
    """Look at what the command line asks for. Raises TwoclocksError."""
    path = options.experiment or default_experiment()
    changes = [] if options.url is None else [f"target.url={options.url}"]
    changes += [f"target.server={options.server}"] if options.server else []
    experiment = load_experiment(path, [*options.set, *changes])
    asked = options.url or options.experiment
    starts = experiment.target.start is not None or is_study(experiment)
    server = look_at_server(experiment.target) if asked and not starts else None
    wanted = ports(experiment)
    facts = look(experiment, wanted, server)
    return Told(list(findings(facts, wanted)), facts)


def ports(experiment: Experiment) -> dict[int, str]:
    """The ports that a run of this experiment listens at, with what for and how to name another."""
    wanted: list[tuple[Any, str]] = [
        (8089, "Locust's web UI; another one: --web-port PORT"),
        (5557, "Locust's workers (--processes); another one: --master-bind-port PORT --master-port PORT"),
        (experiment.collect.otlp_grpc_port, "spans over gRPC; another one: --set collect.otlp_grpc_port=PORT, or none"),
        (experiment.collect.otlp_port, "spans over HTTP; another one: --set collect.otlp_port=PORT, or none"),
        (
            9646 if experiment.export.prometheus_port == "none" else experiment.export.prometheus_port,
            "the run's own figures for Prometheus, if asked for; another one: --set export.prometheus_port=PORT",
        ),
    ]
    return {port: what for port, what in wanted if port != "none"}


def findings(facts: Facts, wanted: dict[int, str]) -> Iterator[Finding]:
    """What the facts mean, a finding for each thing looked at; ``wanted``: ports, as `ports` has them. Pure."""
    for judge in _JUDGES:
        yield judge(facts)
    yield from (_port(port, what, facts.ports.get(port, True)) for port, what in wanted.items())
    yield _engines(facts)
    yield Finding("ok", "not needed", "chromium and prometheus: only the project's own tests use them")
    if facts.server is not None:
        yield from _server(facts.server)


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python >= PYTHON:
        return Finding("ok", "python", f"{version} (3.11 or newer is needed)")
    remedy = "make a new environment: PYTHON=python3.11 make install"
    return Finding("problem", "python", f"{version}, and 3.11 or newer is needed", remedy)


def _system(facts: Facts) -> Finding:
    found = f"{facts.system} {facts.release}"
    if facts.system == "Linux":
        return Finding("ok", "system", found)
    remedy = "run the load from Linux, such as a container; elsewhere there are no kernel stamps and no native reader"
    return Finding("note", "system", found, remedy)


def _packages(facts: Facts) -> Finding:
    missing = [name for name, version in facts.installed.items() if version is None]
    if missing:
        return Finding("problem", "packages", f"not installed: {', '.join(missing)}", REINSTALL)
    if not facts.installed:
        return Finding("note", "packages", "twoclocks itself is not installed here", REINSTALL)
    apart = [
        f"{name} {version} (pinned: {facts.pins[name]})"
        for name, version in facts.installed.items()
        if name in facts.pins and facts.pins[name] != version
    ]
    found = f"twoclocks {facts.twoclocks}, {_count(len(facts.installed), 'dependency', 'dependencies')}"
    if apart:
        remedy = f"the tests ran with the pinned versions: {REINSTALL}; or go on, and say so when you report a bug"
        return Finding("note", "packages", f"{found}; other than pinned: {', '.join(apart)}", remedy)
    if not facts.pins:
        return Finding("ok", "packages", f"{found}; no requirements.lock here to hold their versions against")
    return Finding("ok", "packages", f"{found}, of the pinned versions")


def _native_reader(facts: Facts) -> Finding:
    if facts.native_reader:
        return Finding("ok", "native reader", "built: streams are received without Python")
    remedy = "install a C compiler (Debian: apt-get install gcc python3-dev), then: pip install --no-deps -e ."
    found = "not built: Python reads the streams, and beyond a few hundred reads merge"
    return Finding("note", "native reader", found, remedy)


def _kernel_stamps(facts: Facts) -> Finding:
    stamps = facts.stamps
    if not stamps.sent:
        remedy = "arrivals are stamped by Python, as it reads them: run the load from Linux for figures under load"
        return Finding("note", "kernel stamps", f"{facts.system} has none", remedy)
    told = f"{stamps.stamped} of {stamps.sent} messages on a loopback socket were stamped"
    if stamps.stamped < stamps.sent or stamps.before_read_s is None:
        remedy = "run on Linux itself; a sandbox such as gVisor has no stamps. Without them a busy loop reads late"
        return Finding("problem", "kernel stamps", told, remedy)
    told += f", {stamps.before_read_s * 1e6:,.0f} us before they were read (median)"
    if not 0 <= stamps.before_read_s < STAMP_LATE_S:
        remedy = "the wall clock may be stepping: look at the time service (timedatectl, chronyc tracking)"
        return Finding("note", "kernel stamps", told, remedy)
    return Finding("ok", "kernel stamps", told)


def _open_files(facts: Facts) -> Finding:
    limit = facts.files_hard
    if not limit or limit >= FILES_FEW:
        found = f"{limit or 'unlimited'} a process (a run takes as many as the hard limit allows)"
        return Finding("ok", "open files", found)
    remedy = f"each stream is one: ulimit -Hn {FILES_FEW} (as root, or in limits.conf), or --processes"
    return Finding("note", "open files", f"at most {limit} a process", remedy)


def _cores(facts: Facts) -> Finding:
    found = f"{facts.cores} of this machine"
    if facts.usable_cores < facts.cores:
        found = f"{facts.usable_cores:g} may be used of {found}"
    if facts.usable_cores >= 2:
        return Finding("ok", "cores", found)
    remedy = "keep the server on another machine: on one core it and the load generator take turns"
    return Finding("note", "cores", found, remedy)


def _busy(facts: Facts) -> Finding:
    if facts.busy is None:
        return Finding("note", "other work", "this machine does not tell (no /proc/stat)")
    found = f"other processes took {facts.busy:.0%} of the CPU while this looked"
    if facts.busy <= BUSY:
        return Finding("ok", "other work", found)
    return Finding("note", "other work", found, "end what else runs here before a run that counts (top shows it)")


def _stolen(facts: Facts) -> Finding:
    if facts.stolen is None:
        return Finding("note", "stolen time", "this machine does not tell (no /proc/stat)")
    found = f"{facts.stolen:.1%} of the CPU time went to other machines of the same host"
    if facts.stolen <= STOLEN:
        return Finding("ok", "stolen time", found)
    remedy = "take a machine with cores of its own (dedicated, not burstable), or repeat runs and compare them"
    return Finding("note", "stolen time", found, remedy)


def _wake_ups(facts: Facts) -> Finding:
    if facts.woken_late_s is None:
        return Finding("note", "wake-ups", "could not be measured")
    found = f"a sleeper comes back up to {facts.woken_late_s * 1e3:.1f} ms late (p99)"
    if facts.woken_late_s <= WOKEN_LATE_S:
        return Finding("ok", "wake-ups", found)
    remedy = "requests would go out as late as that: end other work, or give this process cores of its own (taskset)"
    return Finding("note", "wake-ups", found, remedy)


def _clock(facts: Facts) -> Finding:
    found = f"{facts.clock_source or 'source unknown'}; a reading takes {facts.clock_read_s * 1e9:,.0f} ns"
    if facts.clock_read_s <= CLOCK_SLOW_S and (facts.clock_source is None or facts.clock_source in GOOD_CLOCKS):
        return Finding("ok", "clock", found)
    remedy = "each stamp costs that: boot with clocksource=tsc, or take another kind of machine"
    return Finding("note", "clock", found, remedy)


def _governor(facts: Facts) -> Finding:
    slow = sorted(set(facts.governors) & SLOW_GOVERNORS)
    if not facts.governors:
        return Finding("ok", "CPU frequency", "not told, as in most virtual machines")
    if not slow:
        return Finding("ok", "CPU frequency", f"governor {', '.join(facts.governors)}")
    remedy = "cores that clock down between tokens lengthen gaps: cpupower frequency-set -g performance"
    return Finding("note", "CPU frequency", f"governor {', '.join(slow)}", remedy)


def _memory(facts: Facts) -> Finding:
    if facts.memory_bytes is None:
        return Finding("note", "memory", "this machine does not tell")
    found = f"{facts.memory_bytes / GIB:,.1f} GiB are available"
    if facts.memory_bytes >= MEMORY_FEW:
        return Finding("ok", "memory", found)
    return Finding(
        "note", "memory", found, "a report takes 0.3 GiB, of 50 million tokens 5 GiB: build it elsewhere (--no-report)"
    )


def _disk(facts: Facts) -> Finding:
    if facts.disk_bytes is None:
        return Finding("note", "disk", f"the free space at {facts.output!r} is not told")
    found = f"{facts.disk_bytes / GIB:,.1f} GiB are free where runs go ({facts.output})"
    if facts.disk_bytes >= DISK_FEW:
        return Finding("ok", "disk", found)
    return Finding("problem", "disk", found, "make room, or name another place: --set output=DIR")


def _gpu(facts: Facts) -> Finding:
    if facts.gpus:
        return Finding("ok", "GPU", f"NVML tells of {', '.join(facts.gpus)}")
    why = (facts.no_gpu or "none was found").partition("; ")[0]
    remedy = "nothing, for a server elsewhere or on a CPU; a DCGM exporter tells of others: collect.gpu"
    return Finding("note", "GPU", why, remedy)


def _engines(facts: Facts) -> Finding:
    there = [f"{kind} ({python})" for kind, python in facts.engines.items() if python is not None]
    missing = [kind for kind, python in facts.engines.items() if python is None]
    found = f"for target.start: {', '.join(there) or 'none'}; models in the cache: {', '.join(facts.models) or 'none'}"
    if not missing:
        return Finding("ok", "engines", found)
    names = sorted({"transformers" if kind == "pytorch" else kind for kind in missing})
    remedy = f"only to have {' or '.join(missing)} started: python3 scripts/prepare.py {' '.join(names)} smollm2"
    return Finding("note", "engines", found, remedy)


def _port(port: int, what: str, is_free: bool) -> Finding:
    purpose, _, other = what.partition("; another one: ")
    if is_free:
        return Finding("ok", f"port {port}", f"free, for {purpose}")
    return Finding("note", f"port {port}", f"taken; it is for {purpose}", f"end what listens there, or {other}")


def _server(facts: ServerFacts) -> Iterator[Finding]:
    """What a server shows of its own clocks."""
    if facts.unreachable is not None:
        yield Finding("problem", "server", *_split(facts.unreachable))
        return
    about = f"{facts.url}: {facts.server}{f' {facts.version}' if facts.version else ''}, model {facts.model}"
    if facts.named is not None and facts.named != facts.server:
        remedy = f"say so: --set target.server={facts.named}, so that its figures are read as its own"
        yield Finding("problem", "server kind", f"{about}; it calls itself {facts.named}", remedy)
    else:
        yield Finding("ok", "server kind", about)
    if facts.refused is not None:
        remedy = "mend target.api, target.model or target.extra_body; a run would fail in the same way"
        yield Finding("problem", "answer", facts.refused, remedy)
        return
    usage = "with a usage count" if facts.has_usage else "without a usage count"
    if facts.has_usage:
        yield Finding("ok", "answer", f"a stream of {_count(facts.tokens or 0, 'token chunk')}, {usage}")
    else:
        remedy = "tokens are then counted as chunks; name a tokenizer.json in target.tokenizer to count them"
        yield Finding("note", "answer", f"a stream of {_count(facts.tokens or 0, 'token chunk')}, {usage}", remedy)
    if facts.told:
        yield Finding("ok", "server's clock", f"of each request, inside the answer: {', '.join(facts.told)}")
    told = set(facts.told) | ({PAGE} if facts.series else set())
    if facts.series:
        yield Finding("ok", "/metrics", f"{facts.series:,} series")
    elif facts.page is not None:
        told.add(PAGE)  # it may tell more than nothing: why it could not be read comes first
        remedy = "see that /metrics can be read from here, or name where it can: collect.metrics_url"
        yield Finding("note", "/metrics", f"cannot be read: {facts.page}", remedy)
    for sentence in silences(facts.server, told):
        what, _, remedy = sentence.rstrip(".").partition("; ")
        told_of = what.replace("This server tells nothing of", "neither its answer nor its /metrics tells of")
        yield Finding("note", "server's clock", told_of, remedy.removesuffix(" to learn it") or None)


_JUDGES: tuple[Callable[[Facts], Finding], ...] = (
    _python, _system, _packages, _native_reader, _kernel_stamps, _open_files, _cores, _busy, _stolen, _wake_ups,
    _clock, _governor, _memory, _disk, _gpu,
)  # fmt: skip


def _split(words: str) -> tuple[str, str | None]:
    """An error's line: what was wrong, and how to go on."""
    wrong, _, remedy = words.rpartition("; ")
    return (wrong, remedy) if wrong else (remedy, None)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
