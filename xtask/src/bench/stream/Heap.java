import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.BitSet;
import java.util.HashMap;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.Semaphore;
import sun.misc.Signal;

/**
 * A heap of objects as programs on a JVM have them: `Heap COUNT SHARE DIRECTORY`.
 *
 * <p>It is an array of COUNT entries, each a HashMap with an Integer, a String of words, a Double and a
 * Long. After each SIGUSR1 a SHARE of them, picked at random, is made anew: new objects in the young
 * generation, garbage where the old ones were.
 *
 * <p>The files `ready-N` in DIRECTORY, the first of a full heap, the others of changes that are done,
 * come by renaming: CRIU finds no file open.
 */
public final class Heap {
    private static final String[] WORDS =
            "process memory page old then written between another session request answer".split(" ");
    private static final int WORDS_OF_A_NAME = 6;

    private final Random random = new Random(5);
    private final Map<?, ?>[] entries;

    private Heap(int count) {
        entries = new Map<?, ?>[count];
        for (int number = 0; number < count; number++) {
            entries[number] = entry(number);
        }
    }

    private Map<String, Object> entry(int number) {
        StringBuilder name = new StringBuilder();
        for (int word = 0; word < WORDS_OF_A_NAME; word++) {
            name.append(WORDS[random.nextInt(WORDS.length)]).append(' ');
        }
        Map<String, Object> entry = new HashMap<>();
        entry.put("id", number);
        entry.put("name", name.append(number).toString());
        entry.put("price", random.nextDouble());
        entry.put("stock", random.nextLong() >>> 24);
        return entry;
    }

    private void change(int count) {
        BitSet changed = new BitSet(entries.length);
        for (int left = count; left > 0; ) {
            int number = random.nextInt(entries.length);
            if (!changed.get(number)) {
                changed.set(number);
                entries[number] = entry(number);
                left--;
            }
        }
    }

    public static void main(String[] args) throws IOException, InterruptedException {
        int count = Integer.parseInt(args[0]);
        int changed = (int) (count * Double.parseDouble(args[1]));
        Path directory = Paths.get(args[2]);
        Semaphore asked = new Semaphore(0);
        Signal.handle(new Signal("USR1"), signal -> asked.release());
        Heap heap = new Heap(count);
        for (int round = 0; ; round++) {
            Path made = Files.createFile(directory.resolve("ready-" + round + ".new"));
            Files.move(made, directory.resolve("ready-" + round));
            asked.acquire();
            heap.change(changed);
        }
    }
}
