# In a clean root: installs the packages, then dumps a process through page-server and restores it by lazy-client.
export PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive

echo "== install"
dpkg --install /packages/*.deb
getent passwd pageferry
test "$(readlink -f /usr/local/sbin/criu)" = /usr/lib/pageferry/criu/criu
for program in pageferry page-server lazy-client; do
    "$program" --version | head -n 1
    test -s "/usr/share/man/man1/$program.1" || test -s "/usr/share/man/man1/$program.1.gz"
done
systemd-analyze verify --man=no /usr/lib/systemd/system/pageferry-agent.service

echo "== look"
# It ends with 1 where something does not work for somebody, such as a runtime that is not there.
pageferry doctor || test $? -eq 1

echo "== dump and restore"
cd /tmp
mkdir images
# until CONDITION holds, but not for ever
until_holds() {
    for _ in $(seq 600); do
        if eval "$1"; then return 0; fi
        sleep 0.1
    done
    echo "never: $1" >&2
    return 1
}
cat >work.sh <<'END'
# What the caller left open is not ours, and CRIU cannot dump it.
for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    if [ "$fd" -gt 2 ]; then eval "exec $fd>&-"; fi
done
echo $$ >pid
for ((n = 1; ; n++)); do
    echo "$n" >count
    sleep 0.1
done
END
setsid bash work.sh </dev/null >out 2>&1 &
until_holds 'test -s pid && test -s count'
pid=$(cat pid)
page-server -d -D images --port 0 --port-file "$PWD/port"
until_holds 'test -s port'
/usr/sbin/criu dump -t "$pid" -D images -j --page-server --address 127.0.0.1 --port "$(cat port)"
before=$(cat count)
pageferry verify images
lazy-client -d -D images
/usr/sbin/criu restore -d -D images -j --lazy-pages
until_holds 'test "$(cat count)" -gt "$before"'
kill -KILL "$pid"
echo "restored, and it went on after $before"

echo "== the other criu"
criu --version
PAGEFERRY_CRIU=/usr/sbin/criu criu check || true

echo "== remove"
dpkg --purge pageferry-criu pageferry
test ! -e /usr/local/sbin/criu
