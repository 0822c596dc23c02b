package main

// These tests cover the command line: where the database comes from, usage and help, creating and
// deleting tables, users and their keys, questions, and how `timedb api` starts. They call run, as
// main does. Only TestUnverifiedConnectionsToTheDatabaseAreKnown and TestManualFitsTheCommands look
// at internals.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
)

// unreachable is the DSN of a database that is down: nobody listens on port 1.
const unreachable = "postgresql://u:hunter2@127.0.0.1:1/db"

// expectWords reports each of the words that text lacks.
func expectWords(t testing.TB, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("no %q in %q", word, text)
		}
	}
}

// expectNoPassword reports the password of these tests' DSNs if it was printed.
func expectNoPassword(t testing.TB, printed string) {
	t.Helper()
	if strings.Contains(printed, "hunter2") {
		t.Errorf("the password was printed: %q", printed)
	}
}

// mustNotServe starts `timedb api`, which must end by itself with the exit code want, and returns what it
// wrote to stderr. A server that does start is stopped after a while; its exit code is 0.
func mustNotServe(t testing.TB, want int, dsn string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	env := func(name string) string {
		if name == "TIMEDB_DSN" {
			return dsn
		}
		return ""
	}
	var out, errs logBuffer
	code := run(ctx, append([]string{"api", "--port", strconv.Itoa(freePort(t))}, args...), env, strings.NewReader(""), &out, &errs)
	if code != want || !strings.Contains(errs.String(), "ERROR: ") {
		t.Fatalf("timedb api %s: exit %d, want %d and an error: %s", strings.Join(args, " "), code, want, &errs)
	}
	return errs.String()
}

// ---- The DSN

func TestDSNComesFromFlagThenTimedbDSNThenDatabaseURL(t *testing.T) { // S29
	t.Parallel()
	good := mustDatabase(t)
	const bad = unreachable
	for _, c := range []struct {
		name                   string
		flag, timedb, database string
		code                   int
	}{
		{"the flag comes before both variables", good, bad, bad, 0},
		{"TIMEDB_DSN comes before DATABASE_URL", "", good, bad, 0},
		{"DATABASE_URL comes last", "", "", good, 0},
		{"a bad flag is not replaced by a variable", bad, good, good, 1},
		{"a bad TIMEDB_DSN is not replaced by DATABASE_URL", "", bad, good, 1},
		{"a bad DATABASE_URL", "", "", bad, 1},
		{"nothing is set", "", "", "", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := []string{"create", "tables", "-y"}
			if c.flag != "" {
				args = append(args, "--dsn", c.flag)
			}
			env := map[string]string{"TIMEDB_DSN": c.timedb, "DATABASE_URL": c.database}
			code, stdout, stderr := runIn(env, "", args...)
			if code != c.code {
				t.Errorf("exit %d, want %d: %s", code, c.code, stderr)
			}
			expectNoPassword(t, stdout+stderr)
			if c.code == 2 {
				expectWords(t, stderr, "ERROR:", "--dsn", "TIMEDB_DSN", "DATABASE_URL")
			}
		})
	}
}

// Whoever gave a wrong DSN learns which one, and where it leads.
func TestUnusableDatabaseIsNamedWithTheSourceOfItsDSN(t *testing.T) { // S6
	t.Parallel()
	good := mustParse(t, mustDatabase(t))
	with := func(change func(u *url.URL)) string {
		u := *good
		change(&u)
		return u.String()
	}
	const tenant = " -y -t " + tenantA
	for _, c := range []struct {
		name, line, variable, dsn string
		want                      []string
	}{
		{"nobody listens", "users list", "TIMEDB_DSN", unreachable, []string{`"db"`, "127.0.0.1:1", "TIMEDB_DSN"}},
		{"nobody listens, by DATABASE_URL", "create tables -y", "DATABASE_URL", unreachable,
			[]string{`"db"`, "127.0.0.1:1", "DATABASE_URL"}},
		{"nobody listens, by the flag", "delete tables -y -d " + unreachable, "TIMEDB_DSN", good.String(),
			[]string{`"db"`, "127.0.0.1:1", "--dsn"}},
		{"nobody listens, for the server", "api", "TIMEDB_DSN", unreachable,
			[]string{`"db"`, "127.0.0.1:1", "TIMEDB_DSN"}},
		{"a database that there is not", "delete tenant" + tenant, "TIMEDB_DSN",
			with(func(u *url.URL) { u.Path = "/timedb_none" }), []string{`"timedb_none"`, good.Host, "does not exist"}},
		{"a user that there is not", "series update -k x --unit MW -t " + tenantA, "TIMEDB_DSN",
			with(func(u *url.URL) { u.User = url.UserPassword("timedb_none", "hunter2") }),
			[]string{good.Host, "timedb_none"}},
		{"a DSN that cannot be read", "delete runs --known-before 2025-01-01" + tenant, "DATABASE_URL",
			"postgresql://u:%zzhunter2@127.0.0.1:1/db", []string{"DATABASE_URL", "cannot be read"}},
		{"a password that begins like a port and a query", "users list", "TIMEDB_DSN",
			"postgresql://u:24168?hunter2@127.0.0.1:1/db", []string{"TIMEDB_DSN", "cannot be read"}},
		{"a password that begins like a port and a fragment", "users list", "TIMEDB_DSN",
			"postgresql://u:24168#hunter2@127.0.0.1:1/db", []string{"TIMEDB_DSN", "cannot be read"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, stdout, stderr := runIn(map[string]string{c.variable: c.dsn}, "", strings.Fields(c.line)...)
			if code != 1 {
				t.Errorf("exit %d, want 1", code)
			}
			expectWords(t, stderr, c.want...)
			expectNoPassword(t, stdout+stderr)
			if password, _ := good.User.Password(); password != "" && strings.Contains(stdout+stderr, password) {
				t.Errorf("the password was printed: %s", stderr)
			}
			if strings.Contains(stderr, "24168") {
				t.Errorf("the beginning of the password was printed: %s", stderr)
			}
		})
	}
}

// The secret is hunter2, alone or within a longer password. A reserved character in a password shifts
// what a URL parser takes for the host, the port and the database, and error texts often repeat those.
func TestPasswordOfADSNIsNeverPrinted(t *testing.T) { // S6
	t.Parallel()
	for _, c := range []struct{ name, dsn string }{
		{"a database that is down", unreachable},
		{"an @ behind the secret", "postgresql://u:hunter2@x@127.0.0.1:1/db"},
		{"an @ before the secret", "postgresql://u:x@hunter2@127.0.0.1:1/db"},
		{"a slash behind the secret", "postgresql://u:hunter2/x@127.0.0.1:1/db"},
		{"a slash before the secret", "postgresql://u:x/hunter2@127.0.0.1:1/db"},
		{"a question mark behind the secret", "postgresql://u:hunter2?x@127.0.0.1:1/db"},
		{"a question mark before the secret", "postgresql://u:x?hunter2@127.0.0.1:1/db"},
		{"a hash behind the secret", "postgresql://u:hunter2#x@127.0.0.1:1/db"},
		{"a hash before the secret", "postgresql://u:x#hunter2@127.0.0.1:1/db"},
		{"a password like a port and a path", "postgresql://localhost:1/hunter2@127.0.0.1:1/db"},
		{"a password like a port and a query", "postgresql://localhost:1?hunter2@127.0.0.1:1/db"},
		{"a password like a port and a fragment", "postgresql://localhost:1#hunter2@127.0.0.1:1/db"},
		{"a broken percent escape", "postgresql://u:%zzhunter2@127.0.0.1:1/db"},
		{"a port that is a word", "postgresql://u:hunter2@127.0.0.1:port/db"},
		{"an unknown sslmode", "postgresql://u:hunter2@127.0.0.1:1/db?sslmode=perhaps"},
		{"a timeout that is a word", "postgresql://u:hunter2@127.0.0.1:1/db?connect_timeout=soon"},
		{"an unclosed IPv6 address", "postgresql://u:hunter2@[::1/db"},
		{"a space in the password", "postgresql://u:hunter2 x@127.0.0.1:1/db"},
		{"a line break in the password", "postgresql://u:hunter2\n@127.0.0.1:1/db"},
		{"the password alone", "hunter2"},
		{"key=value with an unclosed quote", "host=127.0.0.1 port=1 password='hunter2"},
		{"key=value with a port that is a word", "host=127.0.0.1 port=x password=hunter2"},
		{"key=value with a key alone", "password = hunter2 port"},
		{"key=value with a value alone", "host=127.0.0.1 port=1 password=x hunter2"},
		{"key=value with all in the host", "host=u:hunter2@127.0.0.1 port=1"},
		{"a password in the query", "postgresql://u:x@127.0.0.1:1/db?password=hunter2&port=x"},
		{"the scheme of another database", "mysql://u:hunter2@127.0.0.1:1/db"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, args := range [][]string{{"users", "list"}, {"api"}} {
				code, stdout, stderr := runIn(map[string]string{"DATABASE_URL": c.dsn}, "", args...)
				if code == 0 {
					t.Errorf("%v works with the DSN %q", args, c.dsn)
				}
				expectNoPassword(t, stdout+stderr)
			}
		})
	}
}

// A password that begins like a port and a path leads to a server that is up, which would name the rest
// of it as a database that does not exist. PGUSER and PGPASSWORD let it get that far.
func TestPasswordTakenForADatabaseIsNotPrinted(t *testing.T) { // S6
	u := mustParse(t, mustDatabase(t))
	password, _ := u.User.Password()
	t.Setenv("PGUSER", u.User.Username())
	t.Setenv("PGPASSWORD", password)
	for _, c := range []struct{ name, rest string }{
		{"an @ in the database", "/hunter2@127.0.0.1:1"},
		{"a slash in the database", "/hunter2/db"},
		{"an escaped question mark in the database", "/hunter2%3Fdb"},
		{"an escaped hash in the database", "/hunter2%23db"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, stderr := mustRun(t, 1, "postgresql://"+u.Host+c.rest, "", "users", "list")
			expectNoPassword(t, stderr)
		})
	}
}

func TestMisplacedDSNIsNotRepeated(t *testing.T) { // S6
	t.Parallel()
	const dsn = unreachable
	for _, c := range []struct {
		name string
		args []string
	}{
		{"before the command", []string{"-d", dsn, "api"}},
		{"without a flag", []string{"create", "tables", dsn}},
		{"in one word with its flag", []string{"create", "tables", "-d" + dsn}},
		{"in place of a command", []string{dsn}},
		{"as the value of another flag",
			[]string{"api", "--port", "postgresql://127.0.0.1:1/db?password=hunter2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, stdout, stderr := runIn(nil, "", c.args...)
			if code != 2 || stderr == "" {
				t.Errorf("exit %d, want 2 and an error: %q", code, stderr)
			}
			expectNoPassword(t, stdout+stderr)
		})
	}
}

func TestPasswordMayStandInAFile(t *testing.T) { // S29
	dsn := mustDatabase(t)
	u := mustParse(t, dsn)
	password, _ := u.User.Password()
	file := filepath.Join(t.TempDir(), "pgpass")
	if err := os.WriteFile(file, []byte("*:*:*:*:"+password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PGPASSFILE", file)
	u.User = url.User(u.User.Username())
	mustRun(t, 0, u.String(), "", "create", "tables", "-y")
	t.Setenv("PGPASSFILE", filepath.Join(t.TempDir(), "none"))
	if password != "" { // without one, the tests' database lets everybody in
		mustRun(t, 1, u.String(), "", "create", "tables", "-y")
	}
	help, _ := mustRun(t, 0, "", "", "help")
	expectWords(t, help, " ps", "TIMEDB_DSN", "PGPASSFILE")
}

func TestNotebookDSNShapesAreUnderstood(t *testing.T) {
	t.Parallel()
	bare, _, _ := strings.Cut(mustDatabase(t), "?")
	for _, c := range []struct{ name, dsn string }{
		{"no parameters", bare},
		{"sslmode and application_name", bare + "?sslmode=prefer&application_name=notebook"},
		{"the scheme postgres", strings.Replace(bare, "postgresql:", "postgres:", 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 0, c.dsn, "", "create", "tables", "-y")
		})
	}
}

// Most of these addresses have no server, so the test reads the judgement off the store.
func TestUnverifiedConnectionsToTheDatabaseAreKnown(t *testing.T) { // S28
	t.Parallel()
	for _, c := range []struct {
		name, dsn string
		exposed   bool
	}{
		{"loopback", "postgresql://u@127.0.0.1/d", false},
		{"localhost without TLS", "postgresql://u@localhost/d?sslmode=disable", false},
		{"loopback by IPv6", "postgresql://u@[::1]/d", false},
		{"a Unix socket", "host=/run/postgresql user=u", false},
		{"another host, verified", "postgresql://u@db.example/d?sslmode=verify-full", false},
		{"another host by default", "postgresql://u@db.example/d", true},
		{"another host, TLS without verification", "postgresql://u@db.example/d?sslmode=require", true},
		{"another host without TLS", "postgresql://u@192.0.2.1/d?sslmode=disable", true},
		{"a name that begins like loopback", "postgresql://u@127.0.0.1.example/d", true},
		{"another host whose name is not verified", "host=db.example user=u sslmode=verify-ca", true},
		{"another host beside a local one", "postgresql://u@localhost,db.example/d", true},
		{"a local name of another address", "host=localhost hostaddr=192.0.2.1 user=u", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, err := openStore(c.dsn, "public", 0, 1, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			defer st.db.Close()
			if st.exposed != c.exposed {
				t.Errorf("%s: exposed is %v, want %v", c.dsn, st.exposed, c.exposed)
			}
		})
	}
}

// ---- Usage and help

func TestWrongUsageIsNamed(t *testing.T) {
	t.Parallel()
	const create = "users create -d " + unreachable
	for _, c := range []struct{ name, line, want string }{
		{"an email that is a word", create + " -t " + tenantA + " -e nonsense", "--email: expected"},
		{"no email", create + " -t " + tenantA, "--email is required"},
		{"a tenant that is a word", create + " -t x -e a@example.com", "--tenant-id: expected"},
		{"an unknown flag", "users list --nope", "-nope"},
		{"one argument too many", "users list nope", `"nope"`},
		{"an unknown command", "nope", "unknown command"},
		{"no database", "users list", "DATABASE_URL"},
		{"a misspelt command", "users lsit", "did you mean users list?"},
		{"a misspelt command with flags", "user list --json", "did you mean users list?"},
		{"a misspelt group", "user", "did you mean users?"},
		{"letters that changed places", "usres list", "did you mean users list?"},
		{"help on a misspelt command", "help delete tenants", "did you mean delete tenant?"},
		{"a word that is like no command", "nope", "there are create, delete, series, users, keys, audit, api, version"},
		{"a misspelt flag", "users list --tennant-id " + tenantA, "did you mean --tenant-id?"},
		{"a flag that is like none", "users list --nope", "--json"},
		{"a port that is a word", "api --port http", "from 1 to 65535"},
		{"a port too high", "api --port 65536", "from 1 to 65535"},
		{"a port below zero", "api --port -1", "from 1 to 65535"},
		{"a port of zero", "api --port 0", "from 1 to 65535"},
		{"delete runs without a tenant", "delete runs --run-id " + nobody, "--tenant-id is required"},
		{"delete runs without a choice", "delete runs -t " + tenantA, "--run-id or --known-before"},
		{"delete runs with two choices",
			"delete runs -t " + tenantA + " --known-before 2025-01-01 --run-id " + nobody, "expected one of them"},
		{"delete runs with a run_id that is a word", "delete runs -t " + tenantA + " --run-id x", "--run-id: expected UUID"},
		{"delete runs with a time that is a word", "delete runs -t " + tenantA + " --known-before soon",
			"--known-before: expected"},
		{"delete series without a key", "delete series -t " + tenantA, "--key is required"},
		{"delete series without a tenant", "delete series -k load", "--tenant-id is required"},
		{"delete tenant without one", "delete tenant -y", "--tenant-id is required"},
		{"delete tenant with a word", "delete tenant -y -t all", "--tenant-id: expected UUID"},
		{"series update of nothing", "series update --unit MW -t " + tenantA, "--key or --series-id"},
		{"series update without a tenant", "series update -k load --unit MW", "--tenant-id is required"},
		{"series update without a change", "series update -k load -t " + tenantA, "--rename, --unit or --description"},
		{"series update to a blank key", "series update -k load --rename= -t " + tenantA, "--rename: expected"},
		{"series update to a blank unit", "series update -k load --unit= -t " + tenantA, "--unit: expected"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, stderr := runIn(nil, "", strings.Fields(c.line)...)
			if code != 2 {
				t.Errorf("exit %d, want 2", code)
			}
			expectWords(t, stderr, c.want)
		})
	}
}

// The database is down, which alone would give exit code 1. Wrong usage is found before that.
func TestExitCodeOfWrongUsageIsTwo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, line string }{
		{"an unknown command", "nonsense"},
		{"create alone", "create"},
		{"users alone", "users"},
		{"a command's words in the wrong order", "tables create"},
		{"an unknown command on users", "users nonsense"},
		{"help on an unknown command", "help nonsense"},
		{"version with an argument", "version stray"},
		{"version with a flag", "version --nope"},
		{"create tables with an unknown flag", "create tables --nope"},
		{"create tables with an argument", "create tables stray"},
		{"a flag without its value", "create tables --app-role"},
		{"another command's flag", "delete tables --with-users"},
		{"users list with an argument", "users list stray"},
		{"users create without flags", "users create"},
		{"users create without a tenant", "users create -e a@example.com"},
		{"users create without an email", "users create -t " + tenantA},
		{"users create with a tenant that is a word", "users create -t nope -e a@example.com"},
		{"users create with a tenant too long", "users create -t " + tenantA + "0 -e a@example.com"},
		{"users create with an empty email", "users create -e= -t " + tenantA},
		{"users create with an empty tenant", "users create -t= -e a@example.com"},
		{"users create with an email that is a word", "users create -e nonsense -t " + tenantA},
		{"users list with a tenant that is a word", "users list -t nope"},
		{"users deactivate without an email", "users deactivate"},
		{"users deactivate with an empty email", "users deactivate -e="},
		{"users activate without an email", "users activate"},
		{"users activate with a tenant that is a word", "users activate -e a@example.com -t nope"},
		{"users regenerate-key without an email", "users regenerate-key"},
		{"api with a port that is a word", "api --port x"},
		{"api with an argument", "api stray"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, unreachable, "", strings.Fields(c.line)...)
		})
	}
	for _, c := range []struct{ name, email string }{
		{"an email of a space", " "},
		{"an email without a domain", "a@"},
		{"an email without a user", "@example.com"},
		{"an email of an @ alone", "@"},
		{"an email with a line break", "a\nb@example.com"},
		{"an email with a terminal's escape sequence", "a@example.com\x1b[2J"},
		{"an email that is not UTF-8", "a@exa\xffmple.com"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, unreachable, "", "users", "create", "-t", tenantA, "-e", c.email)
		})
	}
}

func TestHelpAndVersionNeedNoDatabase(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, flags string }{
		{"create tables", "-dsn -with-users -schema -app-role -dry-run -yes"},
		{"delete tables", "-dsn -schema -yes"},
		{"delete runs", "-dsn -schema -yes -tenant-id -run-id -known-before"},
		{"delete series", "-dsn -schema -yes -tenant-id -key"},
		{"delete tenant", "-dsn -schema -yes -tenant-id"},
		{"series update", "-dsn -schema -tenant-id -key -series-id -rename -unit -description"},
		{"users create", "-dsn -tenant-id -email -q"},
		{"users list", "-dsn -tenant-id -include-inactive -json"},
		{"users deactivate", "-dsn -email -tenant-id -yes"},
		{"users activate", "-dsn -email -tenant-id"},
		{"users regenerate-key", "-dsn -email -tenant-id -q -yes"},
		{"api", "-dsn -schema -host -port -require-auth -allow-anonymous"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, line := range []string{"help " + c.name, c.name + " -h", c.name + " --help"} {
				stdout, _ := mustRun(t, 0, "", "", strings.Fields(line)...)
				expectWords(t, stdout, strings.Fields(c.flags)...)
			}
		})
	}
	for _, line := range []string{"help", "-h", "--help"} {
		t.Run("the overview by "+line, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, "", "", line)
			expectWords(t, stdout, "users regenerate-key")
		})
	}
	for _, line := range []string{"version", "--version"} {
		t.Run(line, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, "", "", line)
			if !strings.HasPrefix(stdout, "timedb ") {
				t.Errorf("timedb %s prints %q", line, stdout)
			}
		})
	}
}

func TestGroupOfCommandsListsThem(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		group      string
		want, none []string
	}{
		{"users", []string{"users create", "print the first API key", "users list", "users regenerate-key"}, []string{"delete"}},
		{"delete", []string{"delete tables", "delete runs", "delete series", "delete tenant"}, []string{"users create"}},
		{"create", []string{"create tables"}, []string{"users"}},
		{"series", []string{"series update", "rename"}, []string{"delete"}},
	} {
		t.Run(c.group, func(t *testing.T) {
			expect := func(text string) {
				t.Helper()
				expectWords(t, text, c.want...)
				for _, word := range c.none {
					if strings.Contains(text, word) {
						t.Errorf("%q is none of its commands: %s", word, text)
					}
				}
			}
			for _, line := range []string{"help " + c.group, c.group + " -h", c.group + " --help"} {
				stdout, _ := mustRun(t, 0, "", "", strings.Fields(line)...)
				expect(stdout)
			}
			stdout, stderr := mustRun(t, 2, "", "", c.group)
			expect(strings.ReplaceAll(stderr, "timedb help "+c.group, ""))
			if stdout != "" {
				t.Errorf("wrong usage prints %q to stdout", stdout)
			}
		})
	}
}

// The manual has a section on each command and on nothing else. A section lists exactly the flags that
// the command takes, and its example is right usage.
func TestManualFitsTheCommands(t *testing.T) {
	t.Parallel()
	sections := map[string]string{}
	for _, section := range strings.Split(usage, "\n== ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		sections[name] = text
		if !slices.ContainsFunc(commands(), func(cmd command) bool { return cmd.name == name }) {
			t.Errorf("the manual has a section on %q, which is no command", name)
		}
	}
	for _, cmd := range commands() {
		t.Run(cmd.name, func(t *testing.T) {
			text, found := sections[cmd.name]
			if !found {
				t.Fatal("the manual has no section on it")
			}
			expectWords(t, usage, "\n  timedb "+cmd.name+" ") // in the overview
			c := &cli{env: func(string) string { return "" }, stdout: io.Discard, stderr: io.Discard}
			if err := cmd.run(c, t.Context(), []string{"-h"}); !errors.Is(err, flag.ErrHelp) {
				t.Fatalf("-h is %v", err)
			}
			var taken []string
			c.flags.VisitAll(func(f *flag.Flag) { taken = append(taken, f.Name) })
			if told := flagsInSection(text); !slices.Equal(told, taken) {
				t.Errorf("it takes %q, the manual tells of %q", taken, told)
			}
			_, example, found := strings.Cut(text, "\nexample: timedb ")
			if !found {
				if cmd.name != "version" {
					t.Error("the manual gives no example")
				}
				return
			}
			example, _, _ = strings.Cut(example, "\n")
			// Without a DSN that is all that is wrong.
			code, _, stderr := runIn(nil, "", strings.Fields(example)...)
			if code != 2 || !strings.Contains(stderr, "no database") {
				t.Errorf("the manual's example %q is wrong usage: %s", example, stderr)
			}
		})
	}
}

// docs/REFERENCE.md shows each command with exactly the flags that it takes, and explains each flag by all its names.
func TestReferenceFitsTheCommands(t *testing.T) {
	section := sectionOf(mustReference(t), "## Command line")
	explained := map[string][]string{} // all names of a flag, by each of them
	for _, row := range regexp.MustCompile("(?m)^\\| (`-.*?) \\|").FindAllStringSubmatch(section, -1) {
		var names []string
		for _, name := range inBackticks.FindAllStringSubmatch(row[1], -1) {
			names = append(names, name[1])
		}
		for _, name := range names {
			explained[name] = names
		}
	}
	told := map[string]bool{} // flags that some command has
	_, synopses, _ := strings.Cut(section, "```\n")
	synopses, _, _ = strings.Cut(synopses, "```")
	synopses = strings.ReplaceAll(synopses, "\n      ", " ") // a long one goes on in the next line
	for _, cmd := range commands() {
		t.Run(cmd.name, func(t *testing.T) {
			line := regexp.MustCompile(`(?m)^timedb ` + cmd.name + `( .*)?$`).FindString(synopses)
			if line == "" {
				t.Fatal("the reference does not show it")
			}
			var names []string
			for _, name := range regexp.MustCompile(`[\[( ](--?[a-z-]+)`).FindAllStringSubmatch(line, -1) {
				names = append(names, explained[name[1]]...)
				told[name[1]] = true
				if explained[name[1]] == nil {
					t.Errorf("the reference does not explain %s", name[1])
				}
			}
			for i, name := range names {
				names[i] = strings.TrimLeft(name, "-")
				told[name] = true
			}
			slices.Sort(names)
			c := &cli{env: func(string) string { return "" }, stdout: io.Discard, stderr: io.Discard}
			if err := cmd.run(c, t.Context(), []string{"-h"}); !errors.Is(err, flag.ErrHelp) {
				t.Fatalf("-h is %v", err)
			}
			var taken []string
			c.flags.VisitAll(func(f *flag.Flag) { taken = append(taken, f.Name) })
			expectSame(t, "flags", names, taken)
		})
	}
	for name := range explained {
		if !told[name] {
			t.Errorf("the reference explains %s, which no command has", name)
		}
	}
}

// flagsInSection returns the flags that a section of the manual lists, sorted and without dashes.
func flagsInSection(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(strings.TrimSpace(line), "-") {
			continue
		}
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "-") {
				names = append(names, strings.Trim(word, "-,"))
			}
		}
	}
	slices.Sort(names)
	return names
}

// ---- Creating and deleting tables

// createTablesTogether runs create tables four times at once; each must succeed.
func createTablesTogether(t testing.TB, dsn string, more ...string) (warnings string) {
	t.Helper()
	args := append([]string{"create", "tables", "-y"}, more...)
	var all logBuffer
	together(4, func(int) {
		code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", args...)
		if code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
		io.WriteString(&all, stderr)
	})
	return all.String()
}

func TestCreateTablesMayBeRepeatedAndRunConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	createTablesTogether(t, dsn, "--with-users", "--app-role", appRole.name)
	before := relations(t, db, "public")
	stdout, _ := mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users")
	if !strings.Contains(stdout, "values_table") {
		t.Errorf("it does not report what it did: %q", stdout)
	}
	if after := relations(t, db, "public"); after != before {
		t.Errorf("repeating it changed %q to %q", before, after)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	if left := relations(t, db, "public"); left != "" {
		t.Errorf("delete tables left %q", left)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y") // with nothing left to delete
}

func TestNewSchemaMayBeCreatedConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	createTablesTogether(t, dsn, "-s", "new one")
	if relations(t, db, "new one") == "" {
		t.Error("nothing was created")
	}
	// The search path then holds pg_temp alone, but the tables must not become temporary ones:
	// the schema is made again.
	mustExec(t, db, `DROP SCHEMA public`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	if relations(t, db, "public") == "" {
		t.Error("nothing was created in public")
	}
}

func TestTablesOfAnEarlierVersionAreUpgradedInPlace(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, runWith(`"run_params":{"model":"a"},`, at("2025-01-01", "1")))
	s.must(t, 200, "POST", "/upload", key, runWith(`"run_id":"`+nobody+`","run_params":{"n":1e99999},`))
	s.must(t, 200, "POST", "/upload", key, runWith("", seriesRow("wind", "2025-01-01", "1"), seriesRow("wind", "2025-01-02", "null")))
	// A value that is corrected twice, and one that its run gains.
	run := mustQuery(t, s.db, `SELECT run_id FROM runs_table WHERE rows_inserted = 1`)
	for _, value := range []string{"2", "null"} {
		s.must(t, 200, "PUT", "/values", key, `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":`+value+`}]}`)
	}
	s.must(t, 200, "PUT", "/values", key,
		`{"updates":[{"series_key":"load","valid_time":"2025-02-01","run_id":"`+run+`","value":7}]}`)
	mustExec(t, s.db, `UPDATE values_table SET version = 2 WHERE valid_from = '2025-02-01'`)
	before := s.must(t, 200, "GET", "/values?all_versions=true", key, "")
	s.stop()
	makeVersion4(t, s.db)
	// Version 3 had arrays in rows of one value as well.
	mustExec(t, s.db, `UPDATE values_table SET valid_to = valid_from, valid_times = ARRAY[valid_from], "values" = ARRAY[value], value = NULL
		WHERE valid_to IS NULL;
		ALTER TABLE values_table DROP value, ALTER valid_to SET NOT NULL, ALTER valid_times SET NOT NULL,
			ALTER "values" SET NOT NULL`)
	// Version 2 had run_params as jsonb, and a function; foreign keys of values, neither old values nor withdrawals, and
	// a gained value had version 1.
	mustExec(t, s.db, `UPDATE values_table SET version = 1 WHERE valid_from = '2025-02-01';
		DROP TABLE withdrawals_table, audit_table;
		DROP FUNCTION refuse_past CASCADE;
		ALTER TABLE values_table DROP old_value, ADD FOREIGN KEY (tenant_id, run_id) REFERENCES runs_table,
			ADD FOREIGN KEY (tenant_id, series_id) REFERENCES series_table`)
	mustExec(t, s.db, `ALTER TABLE runs_table DROP CONSTRAINT runs_table_run_params_check;
		ALTER TABLE runs_table ALTER run_params TYPE jsonb USING run_params::text::jsonb;
		ALTER TABLE runs_table ADD CHECK (jsonb_typeof(run_params) = 'object');
		CREATE FUNCTION correct_values(uuid, text, jsonb) RETURNS json RETURN NULL::json`)
	// Version 1 had no comment, another compression, and users without a grace.
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS NULL;
		ALTER TABLE values_table ALTER "values" SET COMPRESSION pglz;
		ALTER TABLE users_table ADD key_id text, ADD key_digest bytea, ADD access text, ADD expires_at timestamptz,
			ADD last_used_at timestamptz;
		UPDATE users_table u SET key_id = k.key_id, key_digest = k.key_digest, access = k.access
		FROM keys_table k WHERE k.user_id = u.user_id;
		DROP TABLE keys_table, key_uses`)
	expectWords(t, mustNotServe(t, 1, s.dsn), "version 1", "run timedb create tables")
	warnings := createTablesTogether(t, s.dsn)
	if strings.Count(warnings, "run_params of run "+nobody) != 1 {
		t.Errorf("of run_params that became too long it is said: %s", warnings)
	}
	mustCreateTables(t, s.dsn)
	after := mustAPI(t, s.dsn).must(t, 200, "GET", "/values?all_versions=true", key, "")
	if after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	params := mustQuery(t, s.db, `SELECT string_agg(run_params::text, ' ') FROM runs_table`)
	if params != `{"model": "a"}` {
		t.Errorf("after the upgrade run_params are %s", params)
	}
	corrections := mustQuery(t, s.db, `SELECT string_agg(format('%s %s: %s', version, valid_from::date,
		coalesce(old_value::text, 'NULL')), ', ' ORDER BY valid_from, version) FROM values_table WHERE version > 1`)
	if corrections != "2 2025-01-01: 1, 3 2025-01-01: 2, 2 2025-02-01: NULL" {
		t.Errorf("after the upgrade the old values are %s", corrections)
	}
	foreign := mustQuery(t, s.db, `SELECT count(*) FROM pg_constraint
		WHERE contype = 'f' AND conrelid = 'values_table'::regclass`)
	if foreign != "0" {
		t.Errorf("after the upgrade values_table has %s foreign keys", foreign)
	}
	if left := relations(t, s.db, "public"); strings.Contains(left, "correct_values") {
		t.Errorf("the upgrade leaves %s", left)
	}
	got := mustQuery(t, s.db, `SELECT attcompression FROM pg_attribute
		WHERE attrelid = 'values_table'::regclass AND attname = 'values'`)
	if got != "l" {
		t.Errorf("the compression is %q, want l of lz4", got)
	}
}

// makeVersion4 makes the tables those of version 4, which had the id of a series in each row of values, and in its key. It
// drops the views.
func makeVersion4(t *testing.T, db *sql.DB) {
	t.Helper()
	mustExec(t, db, `ALTER TABLE values_table ADD series_id uuid;
		UPDATE values_table v SET series_id = s.series_id FROM series_table s
		WHERE (s.tenant_id, s.series_number) = (v.tenant_id, v.series_number);
		DROP VIEW current_values, value_blocks;
		DROP INDEX corrections_by_version, values_by_series, blocks_by_series;
		ALTER TABLE values_table DROP series_number, ADD PRIMARY KEY (tenant_id, series_id, valid_from, value_id);
		ALTER TABLE series_table DROP series_number;
		COMMENT ON TABLE runs_table IS 'timedb schema 4'`)
}

// Views of one's own on the view value_blocks live through an upgrade. Single values with arrays lose them, and of two
// corrections with one version the later one becomes the next, with the other's value as its old one.
func TestUpgradeKeepsViewsAndBringsRowsIntoTheirForm(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	for _, value := range []string{"11", "12"} {
		s.must(t, 200, "PUT", "/values", key, `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":`+value+`}]}`)
	}
	before := s.must(t, 200, "GET", "/corrections", key, "")
	s.stop()
	makeVersion4(t, s.db)
	mustExec(t, s.db, `UPDATE values_table c SET version = 2, old_value = 1 WHERE version = 3;
		UPDATE values_table SET valid_to = valid_from, valid_times = ARRAY[valid_from], "values" = ARRAY[value], value = NULL;
		CREATE VIEW value_blocks AS SELECT tenant_id, series_id, run_id, value_id, run_order, version, known_time, change_time,
			changed_by, annotation, tags, valid_from, valid_to, valid_times, valid_time_ends, "values", old_value FROM values_table;
		CREATE VIEW mine AS SELECT series_id, "values" FROM value_blocks WHERE version = 3`)
	mustCreateTables(t, s.dsn)
	if after := mustAPI(t, s.dsn).must(t, 200, "GET", "/corrections", key, ""); after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	mine := mustQuery(t, s.db, `SELECT string_agg(series_key || "values"::text, ' ') FROM mine JOIN series_table USING (series_id)`)
	if mine != "load{12}" {
		t.Errorf("a view of one's own shows %s", mine)
	}
	forms := mustQuery(t, s.db, `SELECT string_agg(version || '=' || value, ' ' ORDER BY version) FROM values_table
		WHERE num_nulls(valid_to, valid_times, "values") = 3`)
	if forms != "1=1 2=11 3=12" {
		t.Errorf("the rows of one value are %s", forms)
	}
}

func TestTablesOfAnEarlierVersionAreDeleted(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	db := mustOpen(t, dsn)
	mustExec(t, db, `DROP VIEW current_values, value_blocks; COMMENT ON TABLE runs_table IS 'timedb schema 3'`)
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	if left := relations(t, db, "public"); left != "" {
		t.Errorf("there are still %s", left)
	}
}

func TestCreateTablesMakesViewsThatAreMissing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	db := mustOpen(t, dsn)
	before := relations(t, db, "public")
	mustExec(t, db, `DROP VIEW value_blocks CASCADE`)
	mustCreateTables(t, dsn)
	if after := relations(t, db, "public"); after != before {
		t.Errorf("there was %s, and now there is %s", before, after)
	}
}

// What there was of keys in version 2 works, or does not, exactly as before.
func TestKeysOfEarlierVersionsWorkAsBefore(t *testing.T) {
	t.Parallel()
	for _, schema := range []string{"public", "other"} {
		t.Run(schema, func(t *testing.T) {
			dsn := mustDatabase(t)
			db := mustOpen(t, dsn)
			mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "--schema", schema, "--app-role", appRole.name)
			mustExec(t, db, `ALTER DATABASE `+mustQuery(t, db, `SELECT current_database()`)+` SET search_path = `+schema)
			db = mustOpen(t, dsn)
			mustExec(t, db, `DROP TABLE keys_table, key_uses;
				ALTER TABLE users_table ADD key_id text NOT NULL, ADD key_digest bytea NOT NULL UNIQUE,
				      ADD access text NOT NULL DEFAULT 'rw', ADD expires_at timestamptz, ADD last_used_at timestamptz,
				      ADD previous_digest bytea UNIQUE, ADD previous_ends_at timestamptz;
				GRANT SELECT (key_digest), UPDATE (last_used_at) ON users_table TO `+appRole.name+`;
				COMMENT ON TABLE runs_table IS 'timedb schema 2'`)
			type oldKey struct {
				name, now, before string // the columns; of the key before it its end
				want, wantBefore  int    // the statuses; 0: there was no key before
			}
			cases := []oldKey{
				{"live", "'rw', true, NULL", "", 200, 0},
				{"live with an end", "'rw', true, now() + interval '1 day'", "", 200, 0},
				{"read-only", "'ro', true, NULL", "", 200, 0},
				{"expired", "'rw', true, now()", "", 401, 0},
				{"deactivated", "'rw', false, NULL", "", 401, 0},
				{"in a grace", "'rw', true, NULL", "now() + interval '1 day'", 200, 200},
				{"after a grace", "'rw', true, NULL", "now()", 200, 401},
				{"without an end of a grace", "'rw', true, now() + interval '1 day'", "NULL", 200, 401},
				{"expired in a grace", "'rw', true, now()", "now() + interval '1 day'", 401, 401},
			}
			keys := map[string][2]string{}
			for _, c := range cases {
				key, id, digest := newKey()
				old, _, oldDigest := newKey()
				keys[c.name] = [2]string{key, old}
				ends := c.before
				if ends == "" {
					ends = "NULL"
					oldDigest = nil
				}
				mustExec(t, db, `INSERT INTO users_table (tenant_id, email, key_id, key_digest, access, is_active, expires_at,
						last_used_at, previous_digest, previous_ends_at)
					VALUES ($1, $2, $3, $4, `+c.now+`, '2025-01-31', $5, `+ends+`)`, tenantA, c.name+"@example.com", id, digest, oldDigest)
			}
			expectWords(t, mustNotServe(t, 1, dsn, "--schema", schema), "version 2", "run timedb create tables")
			for range 2 {
				createTablesTogether(t, dsn, "--schema", schema, "--app-role", appRole.name)
			}
			s := mustAPI(t, dsn, "--schema", schema)
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					s.must(t, c.want, "GET", "/values", keys[c.name][0], "")
					if c.wantBefore != 0 {
						s.must(t, c.wantBefore, "GET", "/values", keys[c.name][1], "")
					}
				})
			}
			s.must(t, 403, "POST", "/upload", keys["read-only"][0], oneValue)
			s.must(t, 200, "POST", "/upload", keys["live"][0], oneValue)
			listed, _ := mustRun(t, 0, dsn, "", "keys", "list", "--schema", schema)
			for _, c := range cases {
				line := regexp.MustCompile(keyID(keys[c.name][0]) + ` .*` + c.name + `@example.com`)
				if !line.MatchString(listed) {
					t.Errorf("the list has no key that was %s:\n%s", c.name, listed)
				}
			}
			if !strings.Contains(listed, "2025-01-31") {
				t.Errorf("the list does not know when keys were used last:\n%s", listed)
			}
			// A key in a grace can be revoked by the id that the upgrade has made.
			made := mustQuery(t, db, `SELECT key_id FROM keys_table WHERE revoked_at > now() AND expires_at IS NULL`)
			mustRun(t, 0, dsn, "", "keys", "revoke", "-y", "--schema", schema, "--key-id", made)
			s.must(t, 401, "GET", "/values", keys["in a grace"][1], "")
			s.must(t, 200, "GET", "/values", keys["in a grace"][0], "")
		})
	}
}

// Some builds of PostgreSQL have no lz4. An event trigger makes this one refuse it, with the same SQLSTATE.
func TestPostgreSQLWithoutLZ4IsServed(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustExec(t, db, `CREATE FUNCTION refuse_lz4() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
			IF EXISTS (SELECT FROM pg_attribute WHERE attcompression = 'l') THEN
				RAISE EXCEPTION USING ERRCODE = 'feature_not_supported';
			END IF;
		END $$;
		CREATE EVENT TRIGGER no_lz4 ON ddl_command_end EXECUTE FUNCTION refuse_lz4()`)
	_, stderr := mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "--app-role", appRole.name)
	expectWords(t, stderr, "WARNING", "without lz4")
	mustExec(t, db, `DROP EVENT TRIGGER no_lz4; DROP FUNCTION refuse_lz4`)
	s := mustAPI(t, dsn)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	s.must(t, 200, "GET", "/values", key, "")
}

func TestTablesOfALaterVersionAreLeftAlone(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustExec(t, db, `COMMENT ON TABLE runs_table IS 'timedb schema 99'`)
	expectWords(t, mustNotServe(t, 1, dsn), "version 99", "the timedb that made them")
	_, stderr := mustRun(t, 1, dsn, "", "create", "tables", "-y")
	expectWords(t, stderr, "version 99", "the timedb that made them")
}

func TestCitusIsAskedForByName(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	_, stderr := mustRun(t, 1, dsn, "", "create", "tables", "--citus", "-y")
	if !strings.Contains(stderr, "CREATE EXTENSION citus") {
		t.Errorf("without the extension: %q", stderr)
	}
	made := mustQuery(t, mustOpen(t, dsn), `SELECT count(*) FROM pg_class
		WHERE relname LIKE '%_table' AND relnamespace = 'public'::regnamespace`)
	if made != "0" {
		t.Errorf("%s tables were made by a command that failed", made)
	}
}

func TestDryRunPrintsSQLThatWorks(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	script, _ := mustRun(t, 0, "", "", "create", "tables", "--dry-run", "--with-users",
		"--app-role", appRole.name, "-s", "dry run")
	if got := relations(t, db, "dry run"); got != "" {
		t.Fatalf("--dry-run created %q", got)
	}
	mustExec(t, db, script)
	mustExec(t, db, script) // it may be repeated
	printed := relations(t, db, "dry run")
	mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "-s", "really")
	if did := relations(t, db, "really"); did != printed || printed == "" {
		t.Errorf("--dry-run makes %q, create tables makes %q", printed, did)
	}
	s := mustAPI(t, dsn, "--schema", "dry run")
	s.must(t, 401, "GET", "/values", "", "")
}

func TestSchemaHoldsEverythingAndNothingElseIsDeleted(t *testing.T) { // S18
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	const schema = `Wind "Nord"` // needs quoting
	mustCreateTables(t, dsn, "--with-users", "--schema", schema)
	if got := relations(t, db, "public"); got != "" {
		t.Errorf("in public there is %q", got)
	}
	mustExec(t, db, `CREATE TABLE "Wind ""Nord""".mine (x int);
		CREATE VIEW "Wind ""Nord""".my_view AS SELECT 1 AS one`)
	s := mustAPI(t, dsn, "-s", schema)
	s.must(t, 401, "GET", "/values", "", "")
	mustCreateTables(t, dsn, "--with-users") // the same tables in public must survive too
	public := relations(t, db, "public")
	mustRun(t, 0, dsn, "", "delete", "tables", "-y", "-s", schema)
	if got := relations(t, db, schema); got != "mine my_view" {
		t.Errorf("after delete tables the schema holds %q", got)
	}
	if got := relations(t, db, "public"); got != public {
		t.Errorf("delete tables in a schema changed public to %q", got)
	}
}

func TestDeleteTablesRefusesToTakeForeignObjectsAlong(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustExec(t, db, `CREATE VIEW report AS SELECT count(*) FROM values_table`)
	before := relations(t, db, "public")
	mustRun(t, 1, dsn, "", "delete", "tables", "-y")
	if got := relations(t, db, "public"); got != before {
		t.Errorf("a view that uses values_table: %q became %q", before, got)
	}
}

func TestCreateWithoutUsersLeavesUsersTableAlone(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustExec(t, db, `CREATE TABLE users_table (x int)`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	columns := mustQuery(t, db, `SELECT string_agg(attname, ' ') FROM pg_attribute
		WHERE attrelid = 'users_table'::regclass AND attnum > 0`)
	if columns != "x" {
		t.Errorf("the columns of users_table became %q", columns)
	}
}

func TestAppRoleCannotRewriteAnything(t *testing.T) { // S19, S39
	t.Parallel()
	s, _ := mustTenant(t)
	app := mustOpen(t, asAppRole(s.dsn))
	type forbidden struct{ name, query string }
	cases := []forbidden{
		{"create a user", `INSERT INTO users_table (tenant_id, email) VALUES (gen_random_uuid(), 'x')`},
		{"create a key", `INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access)
			SELECT 'x', tenant_id, user_id, 'x', sha256('x'), 'rw' FROM users_table`},
		{"forget when keys were used", `DELETE FROM key_uses`},
		{"read the audit trail", `SELECT FROM audit_table`},
		{"forge the audit trail", `INSERT INTO audit_table (os_user, action, detail) VALUES ('x', 'x', 'x')`},
		{"add a column", `ALTER TABLE values_table ADD x int`},
		{"drop a table", `DROP TABLE values_table`},
		{"drop a trigger", `DROP TRIGGER written_now ON values_table`},
		{"switch triggers off", `ALTER TABLE values_table DISABLE TRIGGER ALL`},
		{"pretend to be a replica", `SET session_replication_role = replica`},
		{"create a trigger", `CREATE TRIGGER x BEFORE INSERT ON runs_table
			EXECUTE FUNCTION suppress_redundant_updates_trigger()`},
	}
	for _, table := range []string{"users_table", "keys_table", "key_uses", "audit_table"} {
		cases = append(cases, forbidden{"lock " + table, `DO $$ BEGIN LOCK TABLE ` + table + ` IN ACCESS EXCLUSIVE MODE; END $$`})
	}
	for _, table := range []string{"users_table", "keys_table", "audit_table",
		"runs_table", "series_table", "values_table", "withdrawals_table"} {
		columns := mustQuery(t, s.db, `SELECT string_agg(quote_ident(attname), ' ') FROM pg_attribute
			WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attidentity = ''`, table)
		for _, column := range strings.Fields(columns) {
			query := `UPDATE ` + table + ` SET ` + column + ` = DEFAULT`
			cases = append(cases, forbidden{"update " + table + "." + column, query})
		}
		cases = append(cases,
			forbidden{"delete from " + table, `DELETE FROM ` + table},
			forbidden{"truncate " + table, `TRUNCATE ` + table + ` CASCADE`})
		for _, lock := range []string{"UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"} {
			cases = append(cases, forbidden{"lock " + table + " for " + lock, `SELECT FROM ` + table + ` FOR ` + lock})
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := app.Exec(c.query)
			if refusal := pq.As(err); refusal == nil || refusal.Code != "42501" {
				t.Errorf("%s: %v, want permission denied", c.query, err)
			}
		})
	}
	for _, never := range []string{"infinity", "-infinity", "10000-01-01"} { // which Go could not read back
		if _, err := app.Exec(`INSERT INTO key_uses VALUES ('x', $1)`, never); err == nil {
			t.Errorf("a last use of %s was stored", never)
		}
	}
	// The role may note when a key was last used.
	mustExec(t, app, `INSERT INTO key_uses VALUES ('x', now())`)
	mustExec(t, app, `UPDATE key_uses SET last_used_at = now()`)
}

// Whoever has taken over a server, or its database role, cannot change what a read as of yesterday shows.
func TestNobodyWritesIntoThePast(t *testing.T) { // S38
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	mustExec(t, s.db, `CREATE SEQUENCE versions START 99; GRANT USAGE ON SEQUENCE versions TO `+appRole.name)
	app := mustOpen(t, asAppRole(s.dsn))
	const run = `INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, known_time, rows_inserted,
			request_digest, inserted_at)
		SELECT tenant_id, gen_random_uuid(), 'w', now(), '2020-01-01', 1, sha256(''), %s FROM runs_table LIMIT 1`
	const series = `INSERT INTO series_table (tenant_id, series_key, unit, inserted_at)
		SELECT tenant_id, gen_random_uuid(), 'u', %s FROM runs_table LIMIT 1`
	const value = `INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time, change_time,
			valid_from, value)
		SELECT tenant_id, series_number, run_id, run_order, nextval('versions'), known_time, %s, valid_from, value
		FROM values_table LIMIT 1`
	const withdrawal = `INSERT INTO withdrawals_table (tenant_id, run_id, change_time)
		SELECT tenant_id, run_id, %s FROM runs_table r
		WHERE run_id NOT IN (SELECT run_id FROM withdrawals_table) LIMIT 1`
	for _, c := range []struct {
		name, when string
		refused    bool
	}{
		{"years ago", `'2020-01-01'`, true},
		{"a minute ago", `now() - interval '1 minute'`, true},
		{"in a minute", `clock_timestamp() + interval '1 minute'`, true},
		{"now", `clock_timestamp()`, false},
		{"two seconds before the transaction, by a clock that was set back", `now() - interval '2 seconds'`, false},
	} {
		for _, table := range []struct{ name, insert string }{
			{"run", run}, {"series", series}, {"value", value}, {"withdrawal", withdrawal},
		} {
			t.Run(table.name+" "+c.name, func(t *testing.T) {
				_, err := app.Exec(fmt.Sprintf(table.insert, c.when))
				refusal := pq.As(err)
				switch {
				case c.refused && (refusal == nil || refusal.Code != "P0001"):
					t.Errorf("%v, want the trigger's refusal", err)
				case !c.refused && err != nil:
					t.Error(err)
				}
			})
		}
	}
	// No test can wait for ten minutes, so this reads the condition.
	old := mustQuery(t, s.db, `SELECT count(*) FROM pg_trigger WHERE tgname = 'written_now' AND tgenabled = 'O'
		AND pg_get_triggerdef(oid) LIKE '%transaction_timestamp() < (clock_timestamp() - ''00:10:00''::interval)%'`)
	if old != "4" {
		t.Errorf("%s of 4 tables refuse a transaction that is older than ten minutes", old)
	}
}

// ---- The audit trail

func TestEveryChangeByACommandIsInTheTrail(t *testing.T) { // S39
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	const email = "who@example.com"
	who := mustQuery(t, db, `SELECT session_user`) + " " + operator()
	lines := func() string { return mustQuery(t, db, `SELECT count(*) FROM audit_table`) }
	trail := func(t *testing.T, flags ...string) []map[string]any {
		t.Helper()
		stdout, _ := mustRun(t, 0, dsn, "", append([]string{"audit", "--json"}, flags...)...)
		return mustDecode[[]map[string]any](t, stdout)
	}
	for _, c := range []struct{ args, detail string }{
		{"users create -t " + tenantA + " -e " + email, `"default", rw`},
		{"keys create -e " + email + " --name laptop --read-only", `"laptop", ro`},
		{"keys revoke -y --key-id KEY", `"laptop", ro`},
		{"users regenerate-key -y -e " + email, `"default", rw`},
		{"users deactivate -y -e " + email, ""},
		{"users activate -e " + email, ""},
	} {
		t.Run(c.args, func(t *testing.T) {
			before := len(trail(t))
			laptop := mustQuery(t, db, `SELECT max(key_id) FROM keys_table WHERE name = 'laptop'`)
			mustRun(t, 0, dsn, "", strings.Fields(strings.ReplaceAll(c.args, "KEY", laptop))...)
			after := trail(t)
			if len(after) != before+1 {
				t.Fatalf("the trail got %d lines by it, want 1", len(after)-before)
			}
			line := after[before]
			got := fmt.Sprintf("%v %v %v %v %v", line["db_role"], line["os_user"], line["action"], line["tenant_id"], line["email"])
			words := strings.Fields(c.args)
			if want := who + " " + strings.Join(words[:2], " ") + " " + tenantA + " " + email; got != want {
				t.Errorf("the line is %q, want %q", got, want)
			}
			if detail := line["detail"].(string); !strings.Contains(detail, c.detail) {
				t.Errorf("the detail is %q, want %q in it", detail, c.detail)
			}
		})
	}
	before := lines()
	mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", email)
	mustRun(t, 1, dsn, "", "keys", "create", "-e", email, "--name", "default")
	mustRun(t, 1, dsn, "", "users", "deactivate", "-e", email) // nobody to ask
	if lines() != before {
		t.Error("a command that failed left a line")
	}
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantB, "-e", email)
	all := trail(t)
	if n := len(trail(t, "-t", tenantB)); n != 1 {
		t.Errorf("of tenant B the trail has %d lines, want 1", n)
	}
	if n := len(trail(t, "--since", all[len(all)-1]["at"].(string))); n != 1 {
		t.Errorf("since the last line there are %d, want 1", n)
	}
	table, _ := mustRun(t, 0, dsn, "", "audit")
	expectWords(t, table, "DATABASE ROLE", "users regenerate-key", email, operator(), tenantB)
}

// The line and the change are one transaction: without the one there is not the other.
func TestChangeWithoutItsLineIsNotMade(t *testing.T) { // S12, S39
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantA, "-e", "a@example.com")
	id := mustQuery(t, db, `SELECT key_id FROM keys_table`)
	before := users(t, db)
	mustExec(t, db, `ALTER TABLE audit_table ADD CHECK (false) NOT VALID`)
	for _, line := range []string{
		"users create -t " + tenantA + " -e b@example.com", "keys create -e a@example.com --name x",
		"keys revoke -y --key-id " + id, "users regenerate-key -y -e a@example.com",
		"users deactivate -y -e a@example.com", "users activate -e a@example.com",
	} {
		t.Run(line, func(t *testing.T) {
			mustRun(t, 1, dsn, "", strings.Fields(line)...)
			if users(t, db) != before {
				t.Error("the change was made")
			}
		})
	}
}

// Nor is there a line without its change, when it is the commit that fails; and of the change nothing stays.
func TestLineOfWhatWasNotChangedIsNotWritten(t *testing.T) { // S12, S39
	t.Parallel()
	s, key := mustTenant(t)
	run := s.mustUpload(t, key, oneValue).RunID
	replaced := keyID(s.mustReplaceKey(t, "a@example.com", "--grace", "1h"))
	// What a command did is the same, but for what it says at the end.
	state := func() string {
		return users(t, s.db) + s.stored(t) + mustQuery(t, s.db, `SELECT count(*) || max(series_key) FROM audit_table, series_table`)
	}
	for _, c := range []struct{ line, table string }{
		{"users create -t " + tenantA + " -e b@example.com", "users_table"},
		{"keys create -e a@example.com --name x", "keys_table"},
		{"keys revoke -y --key-id " + replaced, "keys_table"},
		{"users regenerate-key -y -e a@example.com", "keys_table"},
		{"users activate -e a@example.com", "users_table"},
		{"users deactivate -y -e a@example.com", "users_table"},
		{"series update -t " + tenantA + " -k load --rename other", "series_table"},
		{"delete runs -y -t " + tenantA + " --run-id " + run, "runs_table"},
		{"delete series -y -t " + tenantA + " -k load", "series_table"},
		{"delete tenant -y -t " + tenantA, "users_table"},
	} {
		t.Run(c.line, func(t *testing.T) {
			mustExec(t, s.db, `CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE OR DELETE ON `+c.table+`
				DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_past()`)
			defer mustExec(t, s.db, `DROP TRIGGER at_commit ON `+c.table)
			before := state()
			_, stderr := mustRun(t, 1, s.dsn, "", strings.Fields(c.line)...)
			expectWords(t, stderr, "must bear the time") // which the trigger says
			if state() != before {
				t.Error("something of it stayed")
			}
		})
	}
}

// ---- Lists of users and keys

func TestListsSayWhatAnOperatorMustActOn(t *testing.T) { // S41
	t.Parallel()
	s, _ := mustTenant(t)
	for name, flags := range map[string]string{
		"soon": "--expires 3d", "later": "--expires 300d", "gone": "--expires 1d", "dead": "", "unused": "--read-only",
	} {
		mustRun(t, 0, s.dsn, "", strings.Fields("keys create -e a@example.com --name "+name+" "+flags)...)
	}
	mustExec(t, s.db, `UPDATE keys_table SET expires_at = now() WHERE name = 'gone'`)
	mustExec(t, s.db, `UPDATE keys_table SET revoked_at = now() WHERE name = 'dead'`)
	mustExec(t, s.db, `INSERT INTO key_uses SELECT key_id, '2025-03-04T05:06Z' FROM keys_table WHERE name = 'later'`)
	grace := s.mustUser(t, tenantA, "grace@example.com")
	s.mustReplaceKey(t, "grace@example.com", "--grace", "1h")
	s.mustUser(t, tenantB, "off@example.com")
	s.mustDeactivate(t, "off@example.com")

	listed, _ := mustRun(t, 0, s.dsn, "", "keys", "list")
	for _, want := range []string{
		`default +a@example.com +rw +active +\S+ \S+ +never +never`,
		`soon +a@example.com +rw +ends soon +\S+ \S+ +20\d\d-`,
		`later +a@example.com +rw +active .* 2025-03-04 05:06`,
		`gone +a@example.com +rw +expired `,
		`dead +a@example.com +rw +revoked `,
		`unused +a@example.com +ro +active `,
		keyID(grace) + ` +default +grace@example.com +rw +ends soon `,
		`off@example.com +rw +deactivated `,
		`(?m)^Keys without an end .*: 3$`,
		`(?m)^Keys that end within two weeks .*: 2$`,
		`(?m)^Expired keys .*: 1$`,
	} {
		if !regexp.MustCompile(want).MatchString(listed) {
			t.Errorf("there is no %s in\n%s", want, listed)
		}
	}
	one, _ := mustRun(t, 0, s.dsn, "", "keys", "list", "-t", tenantB)
	if strings.Contains(one, "a@example.com") || !strings.Contains(one, "off@example.com") {
		t.Errorf("the keys of tenant B:\n%s", one)
	}
	stdout, _ := mustRun(t, 0, s.dsn, "", "keys", "list", "--json", "-e", "GRACE@example.com")
	if n := len(mustDecode[[]map[string]any](t, stdout)); n != 2 {
		t.Errorf("the user has %d keys in JSON, want 2", n)
	}
	inUsers, _ := mustRun(t, 0, s.dsn, "", "users", "list")
	for _, want := range []string{
		`a@example.com +` + tenantA + ` +active +4 +2025-03-04 05:06`,
		`grace@example.com +` + tenantA + ` +active +2 +never`,
		`off@example.com +` + tenantB + ` +deactivated +0 +never`,
	} {
		if !regexp.MustCompile(want).MatchString(inUsers) {
			t.Errorf("there is no %s in\n%s", want, inUsers)
		}
	}
	for line := range strings.Lines(inUsers) {
		if len(line) > 121 {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
}

func TestCreateTablesTellsWhoIsServedAndWhatComesNext(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	stdout, _ := mustRun(t, 0, dsn, "", "create", "tables", "-y")
	expectWords(t, stdout, "Everyone is served", "--with-users", "timedb api")
	for _, flags := range []string{"--with-users", "-y"} { // made now, and found there
		stdout, _ = mustRun(t, 0, dsn, "", "create", "tables", "-y", flags)
		expectWords(t, stdout, "needs a key", "timedb users create")
	}
}

// ---- Series

func TestSeriesUpdateChangesWhatIsGivenAndIsAudited(t *testing.T) { // S39
	t.Parallel()
	s, a := mustTenant(t)
	b := s.mustUser(t, tenantB, "b@example.com")
	for _, key := range []string{a, b} {
		s.must(t, 200, "POST", "/series", key, `{"name":"load","unit":"MW","description":"old"}`)
		s.must(t, 200, "POST", "/series", key, `{"name":"wind","unit":"MW"}`)
	}
	ofB := s.must(t, 200, "GET", "/list_timeseries", b, "")
	id := mustQuery(t, s.db, `SELECT series_id FROM series_table WHERE series_key = 'load' AND tenant_id = $1`, tenantA)
	const query = `SELECT json_build_array(series_key, unit, description) FROM series_table WHERE series_id = $1`
	before := mustQuery(t, s.db, query, id)
	// The cases build on each other.
	for _, c := range []struct {
		name  string
		args  []string
		code  int
		after string // "": as before
		told  string
	}{
		{"rename", []string{"-k", "load", "--rename", "load_mw"}, 0, `["load_mw", "MW", "old"]`, ""},
		{"the old key is gone", []string{"-k", "load", "--unit", "kW"}, 1, "", `"load"`},
		{"unit, by id", []string{"--series-id", id, "--unit", "kW"}, 0, `["load_mw", "kW", "old"]`, ""},
		{"description, by both", []string{"--series-id", id, "-k", "load_mw", "--description", " new "}, 0,
			`["load_mw", "kW", "new"]`, ""},
		{"the id of another key", []string{"--series-id", id, "-k", "wind", "--unit", "GW"}, 1, "", "wind"},
		{"no description", []string{"-k", "load_mw", "--description", ""}, 0, `["load_mw", "kW", null]`, ""},
		{"a key that is taken", []string{"-k", "load_mw", "--rename", "wind", "--unit", "GW"}, 1, "", `"wind" exists`},
		{"its own key", []string{"-k", "load_mw", "--rename", "load_mw"}, 0, `["load_mw", "kW", null]`, ""},
		{"a series that there is not", []string{"-k", "nope", "--unit", "GW"}, 1, "", `"nope"`},
		{"an id that there is not", []string{"--series-id", nobody, "--unit", "GW"}, 1, "", nobody},
		{"of another tenant", []string{"-t", tenantB, "--series-id", id, "--unit", "GW"}, 1, "", id},
		{"all at once", []string{"-k", "load_mw", "--rename", "load", "--unit", "GW", "--description", "x"}, 0,
			`["load", "GW", "x"]`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"series", "update", "-t", tenantA}, c.args...)
			stdout, stderr := mustRun(t, c.code, s.dsn, "", args...)
			want := c.after
			if want == "" {
				want = before
			}
			after := mustQuery(t, s.db, query, id)
			if after != want {
				t.Fatalf("the series is %s, want %s", after, want)
			}
			expectWords(t, stdout+stderr, c.told)
			line := mustQuery(t, s.db, `SELECT action || ' ' || tenant_id || ' ' || detail FROM audit_table
				ORDER BY audit_id DESC LIMIT 1`)
			if c.code == 0 {
				if want := "series update " + tenantA + " " + id + ": " + before + " became " + after; line != want {
					t.Errorf("the trail says %s, want %s", line, want)
				}
				expectWords(t, stdout, after)
			}
			before = after
		})
	}
	if got := mustQuery(t, s.db, `SELECT count(*) FROM audit_table WHERE action = 'series update'`); got != "6" {
		t.Errorf("the trail has %s lines, want 6", got)
	}
	if got := s.must(t, 200, "GET", "/list_timeseries", b, ""); got != ofB {
		t.Errorf("tenant B's series became %s", got)
	}
}

// ---- Questions

// The cases build on each other: the tables and the user of the first serve the next ones.
func TestQuestionsAreAskedAndOnlyYesIsYes(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	tables := func(t testing.TB, db *sql.DB) string { return relations(t, db, "public") }
	data := func(t testing.TB, db *sql.DB) string { return mustQuery(t, db, ofTenantA) }
	u := mustParse(t, dsn)
	place := fmt.Sprintf(`database %q on %s (by TIMEDB_DSN)`, strings.TrimPrefix(u.Path, "/"), u.Host)
	const email = "ask@example.com"
	createUser := func() { mustRun(t, 0, dsn, "", "users", "create", "-t", tenantA, "-e", email) }
	// storeRun is a run of three values and one series.
	storeRun := func() {
		mustExec(t, db, `INSERT INTO series_table (tenant_id, series_id, series_key, unit) VALUES ($1, $2, 'load', 'MW')`,
			tenantA, nobody)
		mustExec(t, db, `INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, known_time, rows_inserted,
			request_digest) VALUES ($1, $2, 'w', now(), now(), 3, sha256(''))`, tenantA, nobody)
		mustExec(t, db, `INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time,
			change_time, valid_from, value) SELECT tenant_id, series_number, run_id, run_order, 1, now(), now(),
			'2024-01-01', 5 FROM runs_table JOIN series_table USING (tenant_id)`)
		mustExec(t, db, `INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time,
			change_time, valid_from, valid_to, valid_times, "values") SELECT tenant_id, series_number, run_id, run_order, 1,
			now(), now(), '2025-01-01', '2025-01-02', '{2025-01-01, 2025-01-02}', '{1, NULL}'
			FROM runs_table JOIN series_table USING (tenant_id)`)
	}
	for _, c := range []struct {
		name    string
		args    []string
		state   func(testing.TB, *sql.DB) string // what only a yes may change
		prepare func()
		told    []string // of what the question says
	}{
		{"create tables", []string{"create", "tables", "--with-users"}, tables, nil, []string{place}},
		{"delete runs", []string{"delete", "runs", "-t", tenantA, "--run-id", nobody}, data, storeRun,
			[]string{place, tenantA, "1 run(s), 3 value(s), 0 series"}},
		{"delete series", []string{"delete", "series", "-t", tenantA, "-k", "load"}, data, nil,
			[]string{place, tenantA, "0 run(s), 0 value(s), 1 series"}},
		{"users regenerate-key", []string{"users", "regenerate-key", "-e", email}, users, createUser, []string{email}},
		{"users deactivate", []string{"users", "deactivate", "-e", email}, users, nil, []string{email}},
		{"delete tenant", []string{"delete", "tenant", "-t", tenantA}, data, storeRun,
			[]string{place, tenantA, "its users", "1 run(s), 3 value(s), 1 series"}},
		{"delete tables", []string{"delete", "tables"}, tables, storeRun,
			[]string{place, "the audit trail", "values_table", "1 run(s), 3 value(s), 1 series"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare()
			}
			before := c.state(t, db)
			for _, answer := range []string{"", "n\n", "\n", "perhaps\n"} {
				_, stderr := mustRun(t, 1, dsn, answer, c.args...)
				if answer == "" && !strings.Contains(stderr, "-y") {
					t.Errorf("with nobody to ask it says %q, want -y in it", stderr)
				}
				expectWords(t, stderr, c.told...)
				if c.state(t, db) != before {
					t.Fatalf("the answer %q changed something", answer)
				}
				if password, _ := u.User.Password(); password != "" && strings.Contains(stderr, password) {
					t.Errorf("the question holds the password: %s", stderr)
				}
			}
			stdout, _ := mustRun(t, 0, dsn, "y\n", c.args...)
			if c.state(t, db) == before {
				t.Error("the answer y changed nothing")
			}
			if lost := c.told[len(c.told)-1]; strings.Contains(lost, "value(s)") && !strings.Contains(stdout, lost) {
				t.Errorf("it says %q, want %q in it", stdout, lost)
			}
		})
	}
}

// ---- Users

// secretPart is most of a key's secret: what follows the prefix and the key_id, without the last three
// characters.
func secretPart(key string) string {
	return key[13:50]
}

func TestUsersCreateShowsTheKeyOnce(t *testing.T) { // S8
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "early@example.com") // no users_table yet
	mustCreateTables(t, dsn, "--with-users")

	stdout, stderr := mustRun(t, 0, dsn, "", "users", "create",
		"--tenant-id", strings.ToUpper(tenantA), "--email", "Alice@example.com")
	found := regexp.MustCompile(`(?m)^API Key: (tdb_\S+)$`).FindStringSubmatch(stdout)
	if found == nil || !wellFormedKey(found[1]) {
		t.Fatalf("no line of the key alone: %q", stdout)
	}
	id := mustQuery(t, db, `SELECT user_id FROM users_table`)
	expectWords(t, stdout, id, tenantA, "Alice@example.com", "not be shown again")
	if n := strings.Count(stdout+stderr, secretPart(found[1])); n != 1 {
		t.Errorf("the key is printed %d times", n)
	}

	_, stderr = mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "aLICE@example.com")
	expectWords(t, stderr, "User with email 'aLICE@example.com' already exists for this tenant.")

	quiet, stderr := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantB, "-e", "Alice@example.com")
	if !wellFormedKey(strings.TrimSuffix(quiet, "\n")) || stderr != "" {
		t.Errorf("-q prints %q and %q, want the key alone", quiet, stderr)
	}

	dump := mustQuery(t, db, `SELECT string_agg(k::text, ' ') FROM keys_table k`) // S6
	for _, key := range []string{found[1], quiet} {
		secret := secretPart(key)
		if strings.Contains(dump, secret) || strings.Contains(dump, hex.EncodeToString([]byte(secret))) {
			t.Errorf("keys_table holds the key: %s", dump)
		}
	}
}

func TestAmbiguousOrUnknownEmailChangesNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	for _, tenant := range []string{tenantA, tenantB} {
		mustRun(t, 0, dsn, "", "users", "create", "-t", tenant, "-e", "both@example.com")
	}
	before := users(t, db)
	for _, line := range []string{"users deactivate -y", "users activate", "users regenerate-key -y"} {
		t.Run(line, func(t *testing.T) {
			_, stderr := mustRun(t, 1, dsn, "", strings.Fields(line+" -e both@example.com")...)
			expectWords(t, stderr, tenantA, tenantB, "--tenant-id")
			mustRun(t, 1, dsn, "", strings.Fields(line+" -e nobody@example.com")...)
			mustRun(t, 1, dsn, "", strings.Fields(line+" -e both@example.com -t "+nobody)...)
			if users(t, db) != before {
				t.Fatal("it changed something")
			}
		})
	}
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "BOTH@example.com", "-t", tenantB)
	if got := mustQuery(t, db, `SELECT tenant_id FROM users_table WHERE NOT is_active`); got != tenantB {
		t.Errorf("deactivated %q, want the user of tenant B", got)
	}
}

func TestUsersListShowsEveryUserAndNoSecret(t *testing.T) { // S8
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	var secrets []string
	for _, email := range []string{"on@example.com", "off@example.com"} {
		key, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantA, "-e", email)
		digest := sha256.Sum256([]byte(strings.TrimSpace(key)))
		secrets = append(secrets, secretPart(key),
			hex.EncodeToString(digest[:]), base64.StdEncoding.EncodeToString(digest[:]))
	}
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantB, "-e", "other@example.com")
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "off@example.com")
	shown := []string{tenantA, "on@example.com", "off@example.com"}
	for _, c := range []struct {
		name, flags       string
		oneTenant, asJSON bool
	}{
		{"a table of all tenants", "", false, false},
		{"JSON of all tenants", "--json", false, true},
		{"include-inactive changes nothing", "--include-inactive", false, false},
		{"a table of one tenant", "-t " + tenantA, true, false},
		{"JSON of one tenant", "--json -t " + tenantA, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, dsn, "", strings.Fields("users list "+c.flags)...)
			expectWords(t, stdout, shown...)
			for _, secret := range secrets {
				if strings.Contains(stdout, secret) {
					t.Errorf("it shows a key or a digest:\n%s", stdout)
				}
			}
			if strings.Contains(stdout, "other@example.com") == c.oneTenant {
				t.Errorf("it does not respect the tenant:\n%s", stdout)
			}
			if !c.asJSON {
				return
			}
			for _, u := range mustDecode[[]map[string]any](t, stdout) {
				if u["is_active"] != (u["email"] != "off@example.com") {
					t.Errorf("is_active is wrong: %v", u)
				}
			}
		})
	}
	for _, line := range []string{"keys list", "keys list --json", "audit", "audit --json"} {
		t.Run(line, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, dsn, "", strings.Fields(line)...)
			expectWords(t, stdout, "on@example.com")
			for _, secret := range secrets {
				if strings.Contains(stdout, secret) {
					t.Errorf("it shows a key or a digest:\n%s", stdout)
				}
			}
		})
	}
}

// ---- Starting the API

func TestAPIRefusesToStartUnsafely(t *testing.T) { // S19, S28
	t.Parallel()
	dsn := mustDatabase(t)
	app := asAppRole(dsn)
	cert, key := mustCertificate(t)
	mustCreateTables(t, dsn)

	// Without users_table, a network is served only if the operator says so.
	expectWords(t, mustNotServe(t, 1, app, "--host", "0.0.0.0"), "--allow-anonymous")
	mustAPI(t, dsn, "--host", "0.0.0.0", "--allow-anonymous")

	mustNotServe(t, 1, unreachable)

	// A certificate needs its key, and the two must not be swapped.
	mustNotServe(t, 2, app, "--tls-cert", cert)
	mustNotServe(t, 1, app, "--tls-cert", key, "--tls-key", cert)
}

// The operator is told what weakens the protection, and of nothing else.
func TestAPIWarnsOfWhatWeakensItsProtection(t *testing.T) { // S19, S28
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	app := asAppRole(dsn)
	mustCreateTables(t, dsn, "--with-users")
	cert, key := mustCertificate(t)
	network := []string{"--host", "0.0.0.0"}
	byTLS := slices.Concat(network, []string{"--tls-cert", cert, "--tls-key", key})
	owner := pq.QuoteIdentifier(mustQuery(t, db, `SELECT current_user`))
	for _, c := range []struct {
		name, dsn     string
		before, after string // SQL of the owner; APP is the API's role
		args          []string
		warning       string // a part of it; "" means that there must be no warning at all
	}{
		{"loopback", app, "", "", []string{"--host", "127.0.0.1"}, ""},
		{"a network in plain text", app, "", "", network, "plain text"},
		{"a network by TLS", app, "", "", byTLS, ""},
		{"an unverified connection to the database", mustSeemFar(t, app), "", "", nil, "sslmode=verify-full"},
		{"a role that may update a column", app, `GRANT UPDATE (annotation) ON values_table TO APP`,
			`REVOKE UPDATE (annotation) ON values_table FROM APP`, nil, "may rewrite"},
		{"a role that may delete", app, `GRANT DELETE ON runs_table TO APP`, `REVOKE DELETE ON runs_table FROM APP`, nil,
			"may rewrite"},
		{"a role that may create users", app, `GRANT INSERT ON users_table TO APP`, `REVOKE INSERT ON users_table FROM APP`,
			nil, "may rewrite"},
		{"a role that may create functions", app, `GRANT CREATE ON SCHEMA public TO PUBLIC`,
			`REVOKE CREATE ON SCHEMA public FROM PUBLIC`, nil, "may rewrite"},
		{"a role that may drop its schema", app, `ALTER SCHEMA public OWNER TO APP`, `ALTER SCHEMA public OWNER TO THE_OWNER`,
			nil, "may rewrite"},
		{"a role that may become one that deletes", app,
			`CREATE ROLE APP_other; GRANT DELETE ON runs_table TO APP_other; ALTER ROLE APP NOINHERIT; GRANT APP_other TO APP`,
			`DROP OWNED BY APP_other; DROP ROLE APP_other; ALTER ROLE APP INHERIT`, nil, "may rewrite"},
		{"a role that may create roles", app, `ALTER ROLE APP CREATEROLE`, `ALTER ROLE APP NOCREATEROLE`, nil, "may rewrite"},
		{"the owner of the tables", dsn, "", "", nil, "may rewrite"},
		{"a role that may not read users", app, `REVOKE SELECT ON users_table FROM APP`, `GRANT SELECT ON users_table TO APP`,
			nil, "may not read"},
		{"a role that may not use the schema", app, `REVOKE USAGE ON SCHEMA public FROM APP, PUBLIC`,
			`GRANT USAGE ON SCHEMA public TO APP, PUBLIC`, nil, "may not read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			names := strings.NewReplacer("APP", appRole.name, "THE_OWNER", owner)
			mustExec(t, db, names.Replace(c.before))
			defer mustExec(t, db, names.Replace(c.after))
			s := mustAPIOn(t, dsn, c.dsn, c.args...)
			if code := s.stop(); code != 0 {
				t.Errorf("exit %d, want 0", code)
			}
			log := s.log.String()
			if warned := strings.Contains(log, "level=WARN"); warned != (c.warning != "") {
				t.Errorf("a warning: %v, want %v", warned, !warned)
			}
			expectWords(t, log, c.warning)
		})
	}
}

// mustSeemFar is the same database under a host name that is not local; hostaddr still leads to it.
func mustSeemFar(t testing.TB, dsn string) string {
	t.Helper()
	u := mustParse(t, dsn)
	addresses, err := net.LookupHost(u.Hostname())
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("hostaddr", addresses[0])
	u.RawQuery = query.Encode()
	u.Host = net.JoinHostPort("db.example", u.Port())
	return u.String()
}

// mustCertificate makes a certificate of 127.0.0.1 and its key, in files.
func mustCertificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	signed, err := x509.CreateCertificate(cryptorand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return mustWritePEM(t, "CERTIFICATE", signed), mustWritePEM(t, "PRIVATE KEY", encoded)
}

// mustWritePEM writes one PEM block to a file and returns the file's name.
func mustWritePEM(t testing.TB, kind string, content []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "block.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content})
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// mustTrust is a pool with the certificate in a file.
func mustTrust(t testing.TB, cert string) *x509.CertPool {
	t.Helper()
	roots, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(roots) {
		t.Fatal("the certificate cannot be read")
	}
	return trusted
}

func TestTLSIsSpokenFromVersion12On(t *testing.T) { // S28
	t.Parallel()
	cert, private := mustCertificate(t)
	s, key := mustTenant(t, "--tls-cert", cert, "--tls-key", private)
	if !strings.HasPrefix(s.url, "https://") {
		t.Errorf("it serves %s", s.url)
	}
	trusted := mustTrust(t, cert)
	for _, c := range []struct {
		name    string
		version uint16
		works   bool
	}{
		{"TLS 1.0", tls.VersionTLS10, false},
		{"TLS 1.1", tls.VersionTLS11, false},
		{"TLS 1.2", tls.VersionTLS12, true},
		{"TLS 1.3", tls.VersionTLS13, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &tls.Config{RootCAs: trusted, MinVersion: c.version, MaxVersion: c.version}
			s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
			resp, _, err := s.do("GET", "/list_timeseries", key, "")
			if works := err == nil && resp.StatusCode == 200; works != c.works {
				t.Errorf("it works: %v, want %v: %v %v", works, c.works, resp, err)
			}
		})
	}
	t.Run("plain HTTP on the same port", func(t *testing.T) {
		resp, err := http.Get(strings.Replace(s.url, "https", "http", 1) + "/values")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("status %d, want 400", resp.StatusCode)
		}
	})
	t.Run("a flood of such requests leaves a bounded log", func(t *testing.T) { // S27
		failed := regexp.MustCompile(`level=WARN msg="http: TLS handshake error`)
		for range 2 * addressLines {
			resp, err := http.Get(strings.Replace(s.url, "https", "http", 1) + "/values")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
		}
		waitUntil(t, "the handshakes are logged", func() bool {
			return len(failed.FindAllString(s.log.String(), -1)) >= addressLines
		})
		s.stop()
		if lines := len(failed.FindAllString(s.log.String(), -1)); lines > addressLines {
			t.Errorf("%d lines of failed handshakes, want at most %d", lines, addressLines)
		}
	})
}

func TestMissingTablesAre503UntilTheyAreCreated(t *testing.T) { // S25
	t.Parallel()
	dsn := mustDatabase(t)
	s := mustAPI(t, dsn)
	expectWords(t, s.log.String(), "there are no tables", "there is no users_table")
	const oneUpdate = `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":1}]}`
	for _, c := range []struct{ name, method, path, body string }{
		{"reading values", "GET", "/values", ""},
		{"listing series", "GET", "/list_timeseries", ""},
		{"uploading", "POST", "/upload", oneValue},
		{"updating", "PUT", "/values", oneUpdate},
		{"creating a series", "POST", "/series", `{"name":"x"}`},
		{"listing corrections", "GET", "/corrections", ""},
		{"withdrawing a run", "POST", withdraw(nobody), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 503, c.method, c.path, "", c.body)
			if strings.Contains(text, "table") {
				t.Errorf("it tells of the database: %s", text)
			}
		})
	}
	mustCreateTables(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	s.must(t, 200, "GET", "/values", "", "")
}
