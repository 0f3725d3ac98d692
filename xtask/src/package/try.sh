# In a clean root: installs the packages, then dumps a process through page-server and restores it by lazy-client.
export PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive

echo "== install"
dpkg --install /packages/*.deb
getent passwd pageferry
test "$(readlink -f /usr/local/sbin/criu)" = /usr/bin/pageferry
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
# Starts the process, with $pid, and forgets an earlier one's count.
start_work() {
    rm -f pid count
    setsid bash work.sh </dev/null >out 2>&1 &
    until_holds 'test -s pid && test -s count'
    pid=$(cat pid)
}
start_work
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

if test -d /packages/static; then
    echo "== static programs: dump and lazy restore under TLS, to a host by its name"
    for name in page-server lazy-client criu; do ln -s pageferry "/packages/static/$name"; done
    PATH=/packages/static:$PATH
    ldd /packages/static/pageferry 2>&1 | grep -qE 'not a dynamic|statically linked'
    PAGEFERRY_CRIU=/usr/sbin/criu criu --version
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem 2>openssl.log
    openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out host.csr 2>>openssl.log
    echo 'subjectAltName=DNS:localhost' >names
    openssl x509 -req -in host.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out cert.pem 2>>openssl.log
    tls="--tls --tls-cacert $PWD/ca.pem --tls-cert $PWD/cert.pem --tls-key $PWD/key.pem"
    mkdir secured
    start_work
    # shellcheck disable=SC2086
    page-server -d -D secured --address localhost --port 0 --port-file "$PWD/port.tls" $tls
    until_holds 'test -s port.tls'
    /usr/sbin/criu dump -t "$pid" -D secured -j --page-server --address localhost --port "$(cat port.tls)" $tls
    before=$(cat count)
    pageferry split secured -o lazy
    page-server -d -D lazy --lazy-pages --address localhost --port 0 --port-file "$PWD/port.lazy" $tls
    until_holds 'test -s port.lazy'
    lazy-client -d -D secured --page-server --address localhost --port "$(cat port.lazy)" $tls
    /usr/sbin/criu restore -d -D secured -j --lazy-pages
    until_holds 'test "$(cat count)" -gt "$before"'
    kill -KILL "$pid"
    echo "restored by static programs, and it went on after $before"
    PATH=${PATH#/packages/static:}
fi

echo "== the other criu"
test "$(criu --version)" = "$(/usr/sbin/criu --version)"
test "$(criu page-server --version)" = "$(page-server --version)"
test "$(criu lazy-pages --version)" = "$(lazy-client --version)"

echo "== remove"
dpkg --purge pageferry-criu pageferry
test ! -e /usr/local/sbin/criu
