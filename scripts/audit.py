"""Are there known vulnerabilities in what is pinned? Asks OSV, which holds PyPI's advisories, once for all packages.

    python3 scripts/audit.py [LIST ...]      default: requirements.lock and the servers' lists

Exit code: 0 none is known, or only in the servers' lists, which are for the demo and the tests and pin what the
servers' makers ask for: those are told; 1 at least one is; 0 also where the advisories cannot be had, with a line that
says so, since a machine without that network is no fault of a change; --must: then 3. Standard library only.
"""

import argparse
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ROOT / "servers"
LISTS = ("requirements.lock", "servers/vllm.txt", "servers/transformers.txt")
OSV = os.environ.get("TWOCLOCKS_ADVISORIES", "https://api.osv.dev")
"""Its interface is described at https://google.github.io/osv.dev/post-v1-querybatch/."""
TIMEOUT_S = 30.0
MAX_BYTES = 32 * 1024 * 1024
ACCEPTED: dict[str, str] = {}
"""Advisories that do not concern us, each with the reason."""
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


def pins(text: str) -> dict[str, str]:
    """Normalised name -> version of each ``name==version`` line; a local part such as +cpu is of the build alone."""
    found = filter(None, map(PIN.match, text.splitlines()))
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2].partition("+")[0] for pin in found}


def known(packages: Sequence[tuple[str, str]], ask: Any) -> dict[tuple[str, str], list[str]]:
    """(name, version) -> ids of its advisories, of those that have some. ``ask``: the queries -> OSV's answer."""
    found: dict[tuple[str, str], list[str]] = {}
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages]
    results = ask({"queries": queries})["results"]
    if len(results) != len(packages):
        raise ValueError(f"{len(packages)} packages were asked for, {len(results)} answered")
    for package, result in zip(packages, results, strict=True):
        ids = sorted(one["id"] for one in (result or {}).get("vulns") or [] if one["id"] not in ACCEPTED)
        if ids:
            found[package] = ids
    return found


def ask_osv(queries: dict[str, Any]) -> Any:
    """Raises OSError, HTTPException and ValueError."""
    request = urllib.request.Request(  # noqa: S310  the address is ours
        f"{OSV}/v1/querybatch", json.dumps(queries).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return json.loads(answer.read(MAX_BYTES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is known; the exit code."""
    parser = argparse.ArgumentParser(description="Look for known vulnerabilities in what is pinned.")
    parser.add_argument("lists", nargs="*", type=Path, default=[ROOT / name for name in LISTS])
    parser.add_argument("--must", action="store_true", help="exit code 3 where the advisories cannot be had")
    options = parser.parse_args(arguments)
    where: dict[tuple[str, str], list[str]] = {}
    ours = {path.name for path in options.lists if path.resolve().parent != SERVERS}
    for path in options.lists:
        for pin in pins(path.read_text(encoding="utf-8")).items():
            where.setdefault(pin, []).append(path.name)
    try:
        found = known(list(where), ask_osv)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        print(f"audit: NOT DONE, the advisories at {OSV} could not be had ({reason}); {len(where)} pins not looked at")
        return 3 if options.must else 0
    for (name, version), ids in found.items():
        print(f"audit: {name} {version} ({', '.join(where[name, version])}): {', '.join(ids)}")
    print(f"audit: {len(where)} pins, {len(found)} of them with known vulnerabilities")
    return 1 if any(ours & set(where[pin]) for pin in found) else 0


if __name__ == "__main__":
    sys.exit(main())
