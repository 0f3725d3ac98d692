#!/usr/bin/env bash
# CRIU and crit 4.2.1 (Debian sid). The flags in pagemap images of a dump to files without --lazy-pages.
# Expected: PE_LAZY marks pages left out for post-copy, so a plain dump has none.
# Seen: every page that could have been lazy has it (flags 6, PRESENT and LAZY), though its bytes are in the image; only
# pages that never can be lazy, those of private file mappings, have PRESENT alone (4). crit decodes both page counts,
# and nr_pages of older readers (compat_nr_pages) is 0.
# Why it matters: a reader that takes LAZY for "not here" finds an empty dump, and one that counts compat_nr_pages as
# older images need counts nothing.
. "$(dirname "$0")/lib/common.bash"
need_root
debian sid criu=4.2.1 python3-pycriu=4.2.1
mkdir "$TMP/images"
setsid sleep 1000 </dev/null >"$TMP/sleep.log" 2>&1 &
pid=$!
STARTED+=("$pid")
until [ "$(cat "/proc/$pid/comm")" = sleep ] && grep -q "^$pid (sleep) S" "/proc/$pid/stat"; do sleep 0.05; done
run_in sid usr/sbin/criu dump -t "$pid" -D "$TMP/images" -o dump.log -R >"$TMP/said" 2>&1 \
    || { cat "$TMP/images/dump.log" >&2; cannot "criu dump fails on this machine"; }
python=$(basename "$(readlink -f "$TMP/sid/root/usr/bin/python3")")
PYTHONHOME=$TMP/sid/root/usr PYTHONPATH=$TMP/sid/root/usr/lib/python3/dist-packages \
    run_in sid "usr/bin/$python" "$TMP/sid/root/usr/bin/crit" decode -i "$TMP/images/pagemap-$pid.img" -o "$TMP/pagemap.json"
PYTHONHOME=$TMP/sid/root/usr run_in sid "usr/bin/$python" - "$TMP/pagemap.json" "$TMP/images" >"$TMP/output" <<'P'
import glob, json, os, sys
entries = json.load(open(sys.argv[1]))["entries"][1:]
flags = {}
for entry in entries:
    flags[entry["flags"]] = flags.get(entry["flags"], 0) + entry["nr_pages"]
stored = sum(os.path.getsize(f) for f in glob.glob(sys.argv[2] + "/pages-*.img")) // 4096
print("flags seen:", sorted(flags))
print("pages with flag LAZY: some" if flags.get(6) else "pages with flag LAZY: none")
print("all pages are in the pages image:", sum(flags.values()) <= stored)
print("sum of compat_nr_pages:", sum(e["compat_nr_pages"] for e in entries))
P
expect_output <<'END'
flags seen: [4, 6]
pages with flag LAZY: some
all pages are in the pages image: True
sum of compat_nr_pages: 0
END
