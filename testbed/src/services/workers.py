"""Workers that write memory by a rule, and a server that tells what it holds.

A worker has a page of counters and PAGES pages. Step n sets its state to state * A + C, and writes it to both ends of
page n % PAGES. A client asks "WORKER PAGE" and is told "n state first last", from which it can tell what is right.
"""
import mmap, os, selectors, socket, struct, sys, threading, time

KIND, PORT, WORKERS, PAGES = sys.argv[1], *map(int, sys.argv[2:])
PAGE = 4096
A, C, MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1

shared = KIND == "forks"
size = (PAGES + 1) * PAGE
memory = [mmap.mmap(-1, size) if shared else bytearray(size) for _ in range(WORKERS)]
for worker, area in enumerate(memory):
    struct.pack_into("<QQQ", area, 0, 0, 0, worker + 1)


def step(area):
    """Between the two writes of its first word the area is being changed."""
    turn, n, state = struct.unpack_from("<QQQ", area, 0)
    struct.pack_into("<Q", area, 0, turn + 1)
    n, state = n + 1, (state * A + C) & MASK
    page = PAGE * (1 + n % PAGES)
    struct.pack_into("<Q", area, page, state)
    struct.pack_into("<Q", area, page + PAGE - 8, state)
    struct.pack_into("<QQ", area, 8, n, state)
    struct.pack_into("<Q", area, 0, turn + 2)


def read(area, page):
    at = PAGE * (1 + page)
    while True:
        turn, n, state = struct.unpack_from("<QQQ", area, 0)
        first, = struct.unpack_from("<Q", area, at)
        last, = struct.unpack_from("<Q", area, at + PAGE - 8)
        if turn % 2 == 0 and struct.unpack_from("<Q", area, 0)[0] == turn:
            return n, state, first, last
        time.sleep(0)


def work(area):
    while True:
        for _ in range(4):
            step(area)
        time.sleep(0.002)


if KIND == "threads":
    for area in memory[1:]:
        threading.Thread(target=work, args=(area,), daemon=True).start()
if KIND == "forks":
    # Two children, and the rest are children of theirs.
    for number in (1, 2):
        if os.fork() == 0:
            for area in memory[number + 2::2]:
                if os.fork() == 0:
                    work(area)
            work(memory[number])

listener = socket.create_server(("0.0.0.0", PORT))
looks = selectors.DefaultSelector()
looks.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in looks.select():
        if key.fileobj is listener:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            looks.register(connection, selectors.EVENT_READ)
            continue
        question = key.fileobj.recv(64)
        if not question:
            looks.unregister(key.fileobj)
            key.fileobj.close()
            continue
        for _ in range(8):
            step(memory[0])
        worker, page = map(int, question.split())
        answer = "%d %d %d %d\n" % read(memory[worker], page)
        key.fileobj.sendall(answer.encode())
