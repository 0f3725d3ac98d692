/* For programs that are dumped and restored: they live in the directory of their first argument. */
#include "memory.h"
#include <sys/stat.h>

UNUSED static void live_in(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]))
        exit(77);
}

/* Says that the program can be dumped, and returns once the dump is over: restored, or left running. */
UNUSED static void until_dumped(void)
{
    close(open("ready", O_CREAT | O_WRONLY, 0600));
    while (access("go", F_OK))
        usleep(1000);
}

/* Where the program writes what it sees afterwards. */
UNUSED static FILE *seen(void)
{
    FILE *file = fopen("seen.part", "w");
    if (!file)
        exit(77);
    return file;
}

UNUSED static void end_of_seen(FILE *file)
{
    if (fclose(file) || rename("seen.part", "seen"))
        exit(77);
}
