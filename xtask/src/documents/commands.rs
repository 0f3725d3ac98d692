//! Commands that documents show, run by a test or not: their subcommands and options exist.

use clap::Command;

/// What stands before a command in transcripts: whose prompt it is.
const PROMPTS: [&str; 3] = ["src$ ", "dst$ ", "# "];

/// Words that end a command, or begin what is not its own.
const ENDS: [&str; 7] = ["|", "||", "&&", ";", "&", ">", "#"];

/// What is wrong with the commands in the blocks of code of `text`, by line. `programs` are the definitions.
pub(super) fn problems(text: &str, programs: &[Command]) -> Vec<(usize, String)> {
    let mut problems = Vec::new();
    for (line, command) in commands(text) {
        let words = words(&command);
        let Some((name, rest)) = words.split_first() else {
            continue;
        };
        let Some(program) = programs.iter().find(|program| program.get_name() == name) else {
            continue;
        };
        problems.extend(unknown(program, rest).map(|what| (line, format!("{name}: {what}"))));
    }
    problems
}

/// Each line of a block of code, with those that continue it, and without a prompt.
fn commands(text: &str) -> Vec<(usize, String)> {
    let mut commands: Vec<(usize, String)> = Vec::new();
    let (mut is_code, mut goes_on) = (false, false);
    for (at, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            (is_code, goes_on) = (!is_code, false);
            continue;
        }
        if !is_code {
            continue;
        }
        let (part, continued) = match line.strip_suffix('\\') {
            Some(part) => (part, true),
            None => (line, false),
        };
        match commands.last_mut().filter(|_| goes_on) {
            Some((_, command)) => command.push_str(part),
            None => {
                let part = PROMPTS
                    .iter()
                    .find_map(|prompt| part.strip_prefix(prompt))
                    .unwrap_or(part);
                commands.push((at + 1, part.to_owned()));
            }
        }
        goes_on = continued;
    }
    commands
}

/// The words of a command as a shell sees them, as far as it needs no more than quotes, up to its end.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for char in command.trim().chars() {
        match (quote, char) {
            (Some(open), _) if open == char => quote = None,
            (Some(_), _) => word.push(char),
            (None, '\'' | '"') => quote = Some(char),
            (None, ' ') => words.push(std::mem::take(&mut word)),
            (None, _) => word.push(char),
        }
    }
    words.push(word);
    let end = words.iter().position(|word| ENDS.contains(&word.as_str()));
    words.truncate(end.unwrap_or(words.len()));
    words.retain(|word| !word.is_empty());
    words
}

/// The subcommand or the long options among `words` that `program` does not have.
fn unknown<'a>(
    program: &'a Command,
    words: &'a [String],
) -> impl Iterator<Item = String> + use<'a> {
    let sub = words.first().filter(|_| program.has_subcommands());
    let found = sub.and_then(|sub| program.find_subcommand(sub));
    let wrong = match (sub, found) {
        (Some(sub), None) if !sub.starts_with('-') => Some(format!("there is no command {sub}")),
        _ => None,
    };
    let owner = found.unwrap_or(program);
    let has = move |name: &str| {
        let all = owner.get_arguments().chain(program.get_arguments());
        let mut names = all.filter_map(clap::Arg::get_long);
        names.any(|long| long == name) || ["help", "version"].contains(&name)
    };
    let options = words.iter().filter_map(|word| word.strip_prefix("--"));
    let options = options.map(|option| option.split('=').next().unwrap_or_default());
    let lacking = options.filter(move |option| !option.is_empty() && !has(option));
    wrong
        .into_iter()
        .chain(lacking.map(|option| format!("there is no option --{option}")))
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn what_does_not_exist_is_named() {
        let program = || {
            Command::new("tool")
                .arg(Arg::new("verbose").long("verbose"))
                .subcommand(Command::new("go").arg(Arg::new("far").long("far")))
        };
        let check = |text: &str| problems(&format!("```sh\n{text}\n```\n"), &[program()]);
        for right in [
            "tool go --far 3 --verbose",
            "src$ tool go --far='--near' | other --near",
            "tool go \\\n    --far 1",
            "other --near",
            "tool --help",
        ] {
            assert!(check(right).is_empty(), "{right}");
        }
        assert_eq!(
            check("tool go --near")[0].1,
            "tool: there is no option --near"
        );
        assert_eq!(
            check("x\ntool went")[0],
            (3, "tool: there is no command went".to_owned())
        );
        assert_eq!(check("tool go \\\n --near")[0].0, 2);
        assert!(problems("tool went", &[program()]).is_empty());
    }
}
