# Makes a host of a new mount namespace: SYSTEM with a writable layer is its root, SHARED is /shared, HOME (in SHARED)
# the home directory. Programs come from BINARIES, and NSINIT is process 1.
set -e
mount --make-rprivate /
mkdir -p "$HOME"
mount -t tmpfs tmpfs "$PRIVATE"
mkdir "$PRIVATE/root" "$PRIVATE/upper" "$PRIVATE/work" "$PRIVATE/containers"
root=$PRIVATE/root
mount -t overlay overlay -o "lowerdir=$SYSTEM,upperdir=$PRIVATE/upper,workdir=$PRIVATE/work" "$root"
mkdir -p "$root/shared" "$root/var/lib/containers" "$root/etc/criu" "$root/criu"
mkdir -p "$root/usr/local/bin" "$root/usr/local/lib/pageferry"
mount --bind "$SHARED" "$root/shared"
mount --bind "$HOME" "$root/root"
mount --bind "$CRIU" "$root/criu"
# A layer over another layer is none that podman can use.
mount --bind "$PRIVATE/containers" "$root/var/lib/containers"
for program in page-server lazy-client pageferry nsinit; do
    : > "$root/usr/local/bin/$program"
    mount --bind "$BINARIES/$program" "$root/usr/local/bin/$program"
done
# As the package pageferry-criu has it.
ln -sf ../../bin/pageferry "$root/usr/local/lib/pageferry/criu"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir "$root/run/before"
cd "$root"
pivot_root . run/before
umount -l /run/before
rmdir /run/before
cd /
exec nsinit --stay --record "/shared/$SIDE.ends" sleep 100000
