//! Finds the sentences of a document.

/// A paragraph or an entry of a list, with the number of its first line.
pub(super) struct Paragraph {
    line: usize,
    text: String,
}

/// The paragraphs of a document: no tables, headings, blocks of code or lines of HTML.
pub(super) fn paragraphs(document: &str) -> Vec<Paragraph> {
    let mut found: Vec<Paragraph> = Vec::new();
    let (mut is_code, mut goes_on) = (false, false);
    for (number, line) in (1..).zip(document.lines()) {
        let line = line.trim();
        if line.starts_with("```") {
            is_code = !is_code;
            goes_on = false;
        } else if is_code || line.is_empty() || line.starts_with(['|', '#', '<']) {
            goes_on = false;
        } else {
            let (text, is_entry) = match entry(line) {
                Some(text) => (text, true),
                None => (line, false),
            };
            match found.last_mut() {
                Some(last) if goes_on && !is_entry => {
                    last.text.push(' ');
                    last.text.push_str(text);
                }
                _ => found.push(Paragraph {
                    line: number,
                    text: text.to_owned(),
                }),
            }
            goes_on = true;
        }
    }
    found
}

/// What an entry of a list says, if the line begins one.
fn entry(line: &str) -> Option<&str> {
    let bullet = ["- ", "* ", "+ "];
    if let Some(rest) = bullet.iter().find_map(|bullet| line.strip_prefix(bullet)) {
        return Some(rest);
    }
    let (number, rest) = line.split_once(". ")?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some(rest)
}

/// The sentences of more than `most` words: line of the paragraph, words, and how it begins.
pub(super) fn long_sentences(
    paragraphs: &[Paragraph],
    most: usize,
) -> impl Iterator<Item = (usize, usize, String)> {
    paragraphs.iter().flat_map(move |Paragraph { line, text }| {
        let text = without_code(text);
        let long = sentences(&text).into_iter().filter_map(|sentence| {
            let words = sentence
                .split_whitespace()
                .filter(|word| word.contains(char::is_alphanumeric))
                .count();
            let start: Vec<&str> = sentence.split_whitespace().take(8).collect();
            (words > most).then(|| (*line, words, start.join(" ")))
        });
        long.collect::<Vec<_>>()
    })
}

/// What stands between backticks counts as one word, the address of a link as none.
fn without_code(text: &str) -> String {
    let mut plain = String::new();
    for (index, part) in text.split('`').enumerate() {
        plain.push_str(if index % 2 == 0 { part } else { "Code" });
    }
    let mut out = String::new();
    let mut rest = plain.as_str();
    while let Some((before, behind)) = rest.split_once("](") {
        out.push_str(before);
        rest = behind.split_once(')').map_or("", |(_, rest)| rest);
    }
    out.push_str(rest);
    out
}

/// Cuts behind a full stop, question mark or exclamation mark if a capital letter, a digit or a mark follows.
fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut start = 0;
    let mut words = text.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let ends = word
            .trim_end_matches(['"', '\'', ')', '*', ']'])
            .ends_with(['.', '?', '!']);
        let begins = words.peek().is_none_or(|next| {
            let first = next.chars().next().unwrap_or_default();
            first.is_uppercase() || first.is_ascii_digit() || "\"'([*".contains(first)
        });
        if ends && begins {
            let end = word.as_ptr() as usize - text.as_ptr() as usize + word.len();
            found.push(&text[start..end]);
            start = end;
        }
    }
    if start < text.len() {
        found.push(&text[start..]);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(document: &str, most: usize) -> Vec<(usize, usize)> {
        long_sentences(&paragraphs(document), most)
            .map(|(line, words, _)| (line, words))
            .collect()
    }

    #[test]
    fn sentences_are_counted_in_words_across_lines() {
        let text =
            "# A heading of many words that is none\n\nOne two\nthree. Four `a b c` five. Six\n";
        assert_eq!(long(text, 0), [(3, 3), (3, 3), (3, 1)]);
        assert!(long(text, 3).is_empty());
    }

    #[test]
    fn entries_of_lists_are_paragraphs_of_their_own() {
        let text = "Before:\n- one two\n  three\n- four\n1. five six\n";
        assert_eq!(long(text, 1), [(2, 3), (5, 2)]);
    }

    #[test]
    fn tables_and_code_are_no_prose() {
        let text = "| a | b c d e |\n\n```sh\none two three four\n```\n\n<img alt=\"a b c\">\n";
        assert!(long(text, 0).is_empty());
    }

    #[test]
    fn a_stop_within_a_word_or_before_a_small_letter_ends_nothing() {
        assert_eq!(long("See ferry.md for 4.2.1 etc. and more.", 0), [(1, 7)]);
        assert_eq!(long("So ([a b](x.md#y) z.) It is.", 0), [(1, 4), (1, 2)]);
    }
}
