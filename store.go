package main

// The words that timedb speaks, the errors that it knows, and all of its SQL. In this order: words,
// errors, shares, the pool, the catalog, users, series, uploads, arrays, reads, corrections,
// erasure, lists.

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

//go:embed schema.sql
var schemaSQL string

// ---- Words: types that know how to read and print themselves, wherever they stand: in JSON, in
// the query, in a CSV or on the command line.

// word is a type that says which texts it takes.
type word interface{ expected() string }

// unfit is the error of a text that is no T. It is of a type to which encoding/json adds the name
// of the field.
func unfit[T word](text []byte) error {
	return &json.UnmarshalTypeError{Value: string(text), Type: reflect.TypeFor[T]()}
}

// timestamp counts microseconds from the first instant of year 1 UTC, where time.Time begins too.
// Zero is no time: not given, or NULL.
type timestamp int64

const (
	unixEpoch     = timestamp(62_135_596_800e6)
	postgresEpoch = timestamp(63_082_281_600e6) // of a timestamptz in binary form: 2000-01-01
	firstTime     = timestamp(52_889_500_800e6) // the years that there are begin with 1677
	lastTime      = timestamp(71_381_779_200e6) // and end with 2262
)

func timestampOf(t time.Time) timestamp { return unixEpoch + timestamp(t.UnixMicro()) }

func (t timestamp) utc() time.Time { return time.UnixMicro(int64(t - unixEpoch)).UTC() }

// append writes t as the API does, in UTC: with six digits of fraction if they are not zero, or
// always.
func (t timestamp) append(b []byte, always bool) []byte {
	seconds := len(b) + len("2006-01-02T15:04:05")
	b = t.utc().AppendFormat(b, time.RFC3339Nano) // much faster than a layout of our own
	b = b[:len(b)-len("Z")]
	if always && len(b) == seconds {
		b = append(b, '.')
	}
	for len(b) > seconds && len(b) < seconds+len(".000000") {
		b = append(b, '0')
	}
	return append(b, "+00:00"...)
}

func (t timestamp) String() string { return string(t.append(nil, false)) }

func (t timestamp) MarshalText() ([]byte, error) { return t.append(nil, false), nil }

// Value is t as a bound argument.
func (t timestamp) Value() (driver.Value, error) {
	if t == 0 {
		return nil, nil
	}
	return t.utc(), nil
}

func (timestamp) expected() string { return bound(0).expected() + ", of the years 1677 to 2262" }

var timeLayouts = []string{
	time.RFC3339,
	"2006-01-02T15:04:05",
	"2006-01-02",
	"2006-01-02T15:04Z07:00",
	"2006-01-02T15:04",
	"2006-01-02T15:04:05Z0700",
	"2006-01-02T15:04:05Z07",
	"2006-01-02T15:04Z0700",
	"2006-01-02T15:04Z07",
}

func (t *timestamp) UnmarshalText(text []byte) error {
	parsed, ok := parseTime(string(text))
	if !ok || parsed < firstTime || parsed >= lastTime {
		return unfit[timestamp](text)
	}
	*t = parsed
	return nil
}

// Offsets that there are, in seconds: from Baker Island to the Line Islands.
const (
	firstOffset = -12 * 3600
	lastOffset  = 14 * 3600
)

// parseTime reads an ISO 8601 timestamp of any year: a date, or date and time with T or a space
// between. No offset means UTC. A plus that a query string has turned into a space is understood.
// Digits beyond microseconds are cut off.
func parseTime(s string) (t timestamp, ok bool) {
	const date = len("2006-01-02")
	if len(s) > date && s[date] == ' ' {
		s = s[:date] + "T" + s[date+1:]
	}
	s = strings.Replace(s, " ", "+", 1)
	const hour = len("2006-01-02T15")
	if len(s) > hour && s[hour] != ':' {
		return 0, false // time.Parse would take an hour of one digit
	}
	for _, layout := range timeLayouts {
		parsed, err := time.Parse(layout, s)
		if err != nil {
			continue
		}
		_, offset := parsed.Zone()
		return timestampOf(parsed), offset >= firstOffset && offset <= lastOffset
	}
	return 0, false
}

// bound is a timestamp that bounds a window, or a moment to look back to. Outside the years that
// there are it is the nearest end of them.
type bound timestamp

func (bound) expected() string { return "ISO 8601 timestamp such as 2025-01-31T12:00Z" }

func (b *bound) UnmarshalText(text []byte) error {
	t, ok := parseTime(string(text))
	if !ok {
		return unfit[bound](text)
	}
	*b = bound(min(max(t, firstTime), lastTime))
	return nil
}

// span is a duration in microseconds, of less than 293 years.
type span timestamp

const day = span(24 * time.Hour / time.Microsecond)

var isoSpan = regexp.MustCompile(`^P?(?:(\d{1,5})[Ww])?(?:(\d{1,6})[Dd])?(?:T([0-9.HMS]+))?$`)

func (span) expected() string { return "duration such as PT36H, P1D or 90m" }

// UnmarshalText reads a duration as ISO 8601 writes it (P1DT12H; no months or years, whose length
// differs), as Go does (36h), or in days or weeks (90d, 6w). What is finer than a microsecond is
// cut off.
func (d *span) UnmarshalText(text []byte) error {
	s := string(text)
	parts := isoSpan.FindStringSubmatch(s)
	if parts != nil && len(s) > 1 {
		weeks, _ := strconv.Atoi(parts[1]) // a few digits, or nothing: zero
		days, _ := strconv.Atoi(parts[2])
		s = fmt.Sprintf("%dh%s", 24*(7*weeks+days), strings.ToLower(parts[3]))
	}
	length, err := time.ParseDuration(s)
	if err != nil || length < 0 {
		return unfit[span](text)
	}
	*d = span(length.Microseconds())
	return nil
}

// width is how long buckets are: a span, or so many days or months of the calendar.
type width struct {
	exact        span
	days, months int
	first        int // day of January 1970 from which days or months are counted
}

// calendarWidth is at least one unit and less than 1,000 years: buckets begin after year 1.
var calendarWidth = regexp.MustCompile(`^P([1-9]\d{0,3}[DWM]|[1-9]\d{0,2}Y)$`)

func (width) expected() string {
	return "duration such as PT15M or 24h, or a number of one calendar unit, D, W, M or Y, such " +
		"as P1D or P3M"
}

func (w *width) UnmarshalText(text []byte) error {
	s := string(text)
	*w = width{first: 1}
	if !strings.HasPrefix(s, "P") || strings.HasPrefix(s, "PT") {
		if w.exact.UnmarshalText(text) != nil || w.exact == 0 {
			return unfit[width](text)
		}
		return nil
	}
	if !calendarWidth.MatchString(s) {
		return unfit[width](text)
	}
	last := len(s) - 1
	n, _ := strconv.Atoi(s[1:last]) // a few digits
	switch s[last] {
	case 'D':
		w.days = n
	case 'W':
		w.days = 7 * n
		w.first = -2 // Monday, 1969-12-29
	case 'M':
		w.months = n
	case 'Y':
		w.months = 12 * n
	}
	return nil
}

// zone is a time zone by its IANA name.
type zone struct{ *time.Location }

// zoneName is what all IANA names look like, but neither localtime nor right/UTC, which a folder of
// zones may have too.
var zoneName = regexp.MustCompile(`^[A-Z][A-Za-z0-9_+/-]*$`)

func (zone) expected() string { return "IANA time zone such as Europe/Berlin" }

func (z *zone) UnmarshalText(text []byte) error {
	name := string(text)
	if !zoneName.MatchString(name) || name == "Local" {
		return unfit[zone](text)
	}
	location, err := time.LoadLocation(name)
	if err != nil {
		return unfit[zone](text)
	}
	z.Location = location
	return nil
}

// timeOfDay is what a clock shows, in microseconds since midnight.
type timeOfDay span

func (timeOfDay) expected() string { return "time of day such as 09:30 or 09:30:15" }

func (d *timeOfDay) UnmarshalText(text []byte) error {
	var t timestamp
	err := t.UnmarshalText([]byte("1970-01-01T" + string(text)))
	if err != nil || bytes.ContainsAny(text, "Z+- .,") { // neither an offset nor a fraction
		return unfit[timeOfDay](text)
	}
	*d = timeOfDay(t - unixEpoch)
	return nil
}

// dayCount is a number of days, of less than 180 years.
type dayCount int

func (dayCount) expected() string { return "whole number from 0 to 65,535" }

func (n *dayCount) UnmarshalText(text []byte) error {
	value, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil {
		return unfit[dayCount](text)
	}
	*n = dayCount(value)
	return nil
}

// expiry is a time to come: a timestamp, or a span from now on. Zero is never.
type expiry timestamp

// time is when something ends; nil is never.
func (e expiry) time() *time.Time {
	if e == 0 {
		return nil
	}
	t := timestamp(e).utc()
	return &t
}

func (expiry) expected() string { return "90d, 12h or a timestamp, to come" }

func (e *expiry) UnmarshalText(text []byte) error {
	now := timestampOf(time.Now())
	var after span
	var ends timestamp
	if err := after.UnmarshalText(text); err == nil {
		ends = now + timestamp(after)
	} else if err := ends.UnmarshalText(text); err != nil {
		return unfit[expiry](text)
	}
	if ends <= now {
		return unfit[expiry](text)
	}
	*e = expiry(ends)
	return nil
}

// showTime is a time for people, in UTC; nil is never.
func showTime(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04")
}

// uuid is a UUID in lower case.
type uuid string

var uuidPattern = regexp.MustCompile(
	`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func (uuid) expected() string { return "UUID" }

func (u *uuid) UnmarshalText(text []byte) error {
	*u = uuid(strings.ToLower(string(text)))
	if !uuidPattern.MatchString(string(*u)) {
		return unfit[uuid](text)
	}
	return nil
}

// label is a key, unit, workflow_id, e-mail address or tag, without white space around it.
type label string

const maxLabel = 500 // bytes; PostgreSQL indexes keys of up to some 2,700

func (label) expected() string {
	return "text of 1 to 500 bytes without control or format characters"
}

func (l *label) UnmarshalText(text []byte) error {
	bare := bytes.TrimSpace(text)
	if len(bare) == 0 || len(text) > maxLabel || bytes.ContainsFunc(bare, invisible) {
		return unfit[label](text)
	}
	*l = label(bare)
	return nil
}

// invisible is true of what makes two texts that look the same differ: format characters, which
// have no width or turn the direction, too.
func invisible(r rune) bool { return unprintable(r) || unicode.Is(unicode.Cf, r) }

// asTag is l in the form in which tags are stored.
func (l label) asTag() string { return strings.ToLower(string(l)) }

// unprintable is true of control characters and of what stands for bytes that are not UTF-8.
func unprintable(r rune) bool { return r == unicode.ReplacementChar || unicode.IsControl(r) }

// pattern is a pattern of labels, in which * is any characters and ? one, as LIKE has it.
type pattern string

var likeWords = strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`, `*`, `%`, `?`, `_`)

func (p *pattern) UnmarshalText(text []byte) error {
	var l label
	err := l.UnmarshalText(text)
	*p = pattern(likeWords.Replace(string(l)))
	return err
}

// prose is a description or an annotation, without white space around it.
type prose string

const maxProse = 10_000 // bytes

func (prose) expected() string { return "text of at most 10,000 bytes" }

func (p *prose) UnmarshalText(text []byte) error {
	bad := func(r rune) bool { return unprintable(r) && !strings.ContainsRune("\t\r\n", r) }
	if len(text) > maxProse || bytes.ContainsFunc(text, bad) {
		return unfit[prose](text)
	}
	*p = prose(bytes.TrimSpace(text))
	return nil
}

// object is a JSON object, kept as it was sent.
type object []byte

const maxObject = 16 << 10 // bytes

func (object) expected() string { return "JSON object of at most 16,384 bytes" }

func (o *object) UnmarshalText(text []byte) error {
	if len(text) > maxObject || !utf8.Valid(text) || !json.Valid(text) || text[0] != '{' {
		return unfit[object](text)
	}
	*o = bytes.Clone(text)
	return nil
}

// UnmarshalJSON takes null for nothing.
func (o *object) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		return nil
	}
	return o.UnmarshalText(text)
}

// descriptions are texts by value_key.
type descriptions map[label]prose

func (descriptions) expected() string { return "JSON object of texts" }

func (d *descriptions) UnmarshalText(text []byte) error { return d.UnmarshalJSON(text) }

func (d *descriptions) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(text, (*map[label]prose)(d))
}

// number is a value: any float64 but infinity, or NULL, which is NaN.
type number float64

// notGiven is what no input can be.
var notGiven = number(math.Inf(1))

func (number) expected() string { return "finite number or null" }

func (n *number) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		b = nil
	}
	return n.UnmarshalText(b)
}

// UnmarshalText takes nothing and NaN for NULL. Other spellings that strconv knows, such as nan,
// 0x1p-2 or 1_000, are refused.
func (n *number) UnmarshalText(text []byte) error {
	s := string(text)
	if s == "" || s == "NaN" {
		*n = number(math.NaN())
		return nil
	}
	isGo := strings.ContainsAny(s, "xX_") // as only Go writes numbers
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || isGo || math.IsNaN(f) || math.IsInf(f, 0) {
		return unfit[number](text)
	}
	*n = number(f)
	return nil
}

// appendNumber writes f so that it reads as a float: 20.0, not 20. NaN is written as null says.
func appendNumber(b []byte, f float64, null string) []byte {
	abs := math.Abs(f)
	switch {
	case math.IsNaN(f):
		return append(b, null...)
	case abs != 0 && (abs < 1e-4 || abs >= 1e16):
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	case f == math.Trunc(f):
		b = strconv.AppendFloat(b, f, 'f', -1, 64)
		return append(b, ".0"...)
	}
	return strconv.AppendFloat(b, f, 'f', -1, 64)
}

// boolean is true or false in a query.
type boolean bool

func (boolean) expected() string { return "true or false" }

func (f *boolean) UnmarshalText(text []byte) error {
	value, err := strconv.ParseBool(string(text))
	if err != nil {
		return unfit[boolean](text)
	}
	*f = boolean(value)
	return nil
}

// count is a number of rows.
type count int64

func (count) expected() string { return "whole number of at least 1" }

func (n *count) UnmarshalText(text []byte) error {
	value, err := strconv.ParseInt(string(text), 10, 64)
	if err != nil || value < 1 {
		return unfit[count](text)
	}
	*n = count(value)
	return nil
}

// optional is a member of which it matters whether it is absent, or null, or has a value.
type optional[T any] struct {
	given bool
	value *T // nil is null
}

func (o *optional[T]) UnmarshalJSON(b []byte) error {
	o.given = true
	return json.Unmarshal(b, &o.value)
}

// nearestName returns the one of known that name was probably meant to be, or "".
func nearestName(name string, known []string) string {
	nearest := ""
	most := 0
	for _, candidate := range known {
		alike := lettersAlike(name, candidate)
		longer := max(len(name), len(candidate))
		if alike > most && 5*alike >= 3*longer {
			nearest = candidate
			most = alike
		}
	}
	return nearest
}

// lettersAlike counts the letters before and after a typo: those with which both begin, and end.
func lettersAlike(a, b string) int {
	shorter := min(len(a), len(b))
	begin := 0
	for begin < shorter && a[begin] == b[begin] {
		begin++
	}
	end := 0
	for end < shorter-begin && a[len(a)-1-end] == b[len(b)-1-end] {
		end++
	}
	return begin + end
}

// ---- Errors

// errorKind is what an error means for whoever asked. server.go gives each kind its HTTP status.
type errorKind string

const (
	invalidInput errorKind = "invalid input"
	notFound     errorKind = "not found"
	conflict     errorKind = "conflict"
	forbidden    errorKind = "forbidden"
	busy         errorKind = "busy"
	tooLarge     errorKind = "too large"
)

// refusal is an error that whoever asked may read.
type refusal struct {
	kind    errorKind
	message string
	reason  string // for the log: the message without what it repeats of the input
}

func (e *refusal) Error() string { return e.message }

// maxMessage bounds what a refusal repeats of the input, in characters.
const maxMessage = 1000

// verb is the place of an argument in a format.
var verb = regexp.MustCompile(`%[.0-9]*[a-z]`)

func refuse(kind errorKind, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	reason := verb.ReplaceAllLiteralString(format, "…")
	return &refusal{kind, fmt.Sprintf("%.*s", maxMessage, message), reason}
}

// prefix says where in the request a refusal belongs.
func prefix(where string, err error) error {
	var refused *refusal
	if errors.As(err, &refused) {
		return &refusal{refused.kind, where + refused.message, refused.reason}
	}
	return err
}

func invalid(format string, args ...any) error { return refuse(invalidInput, format, args...) }

// sqlState returns the five-character code of a PostgreSQL error, "" for any other error.
func sqlState(err error) string {
	if e := pq.As(err); e != nil {
		return string(e.Code)
	}
	return ""
}

// causeOf is what the log may say of an error. PostgreSQL's messages on data and constraints may
// repeat values, so of those there is only the code and the constraint.
func causeOf(err error) string {
	state := sqlState(err)
	if strings.HasPrefix(state, "22") || strings.HasPrefix(state, "23") {
		return fmt.Sprintf("SQLSTATE %s, constraint %q", state, pq.As(err).Constraint)
	}
	return err.Error()
}

const uniqueViolation = "23505" // a SQLSTATE

// lostConnection are the errors that Go and lib/pq have for a database that cannot be asked.
var lostConnection = []error{
	context.Canceled, context.DeadlineExceeded, driver.ErrBadConn, io.EOF, io.ErrUnexpectedEOF,
	sql.ErrConnDone, sql.ErrTxDone,
}

// cannotServe are the beginnings of SQLSTATEs that say that the database cannot serve now.
// https://www.postgresql.org/docs/15/errcodes-appendix.html
var cannotServe = []string{
	"08",    // connection
	"28",    // authorization
	"40",    // rollback, of a deadlock for example
	"53",    // resources
	"57",    // operator intervention
	"58",    // system error
	"42P01", // no such table
	"42883", // no such function
	"42501", // no privilege
	"25006", // a standby, which is read-only
	"3D000", // no such database
	"55000", // not open to connections
	"55006", // object in use
	"0A000", // a plan of an older schema
	"XX000", // an internal error: so Citus says that a node failed
}

// unavailable tells whether err means that the database cannot serve now, rather than a bug.
func unavailable(err error) bool {
	var netErr net.Error
	if errors.As(err, &netErr) {
		return true
	}
	for _, lost := range lostConnection {
		if errors.Is(err, lost) {
			return true
		}
	}
	state := sqlState(err)
	return slices.ContainsFunc(cannotServe, func(start string) bool {
		return strings.HasPrefix(state, start)
	})
}

// ---- Shares: what the tenants have in common is divided among them, so that none can take it all

// shareWait is how long a request waits for its part before it is refused. It may have to wait for
// memory and then for a place: five seconds in all.
const shareWait = 2500 * time.Millisecond

// maxWaiting requests of one tenant wait at a time: each that waits tries again whenever something
// is given back, which takes processor time from all.
const maxWaiting = 100

// shares divides places or bytes among tenants.
type shares struct {
	total int64 // of all tenants together
	share int64 // of each

	mu       sync.Mutex
	taken    int64
	byTenant map[string]int64
	first    map[string]*claim // of each tenant the one that may take the rest of the share
	waiting  map[string]int    // requests of each tenant
	given    chan struct{}     // closed, and made anew, when something is given back
}

func newShares(total, share int64) *shares {
	return &shares{
		total:    total,
		share:    share,
		byTenant: map[string]int64{},
		first:    map[string]*claim{},
		waiting:  map[string]int{},
		given:    make(chan struct{}),
	}
}

// most is what the caller's tenant may have. In open mode there is one tenant, which may have all.
func (s *shares) most(c Caller) int64 {
	if c.open {
		return s.total
	}
	return s.share
}

// tryTake takes a part for the caller's tenant if there is room for it, and otherwise returns a
// channel that is closed when there may be. Requests that grow, each by its claim, may all hold a
// part and wait for more. So that one of them can always go on, the second half of a share is for
// one claim at a time.
func (s *shares) tryTake(c Caller, amount int64, by *claim) (ok bool, retry <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.byTenant[c.tenant] + amount
	if by != nil && held > s.most(c)/2 {
		if s.first[c.tenant] == nil {
			s.first[c.tenant] = by
		}
		if s.first[c.tenant] != by {
			return false, s.given
		}
	}
	if s.taken+amount > s.total || held > s.most(c) {
		return false, s.given
	}
	s.taken += amount
	s.byTenant[c.tenant] += amount
	return true, nil
}

// take takes a part for the caller's tenant, for which it waits until shareWait is over or ctx
// ends. Whoever takes gives back. by is the claim that grows, if one does.
func (s *shares) take(ctx context.Context, c Caller, amount int64, by *claim) error {
	ok, retry := s.tryTake(c, amount, by)
	if ok {
		return nil
	}
	if s.countWaiting(c, 1) > maxWaiting {
		s.countWaiting(c, -1)
		return refuse(busy, "The server is busy with other requests of this tenant.")
	}
	defer s.countWaiting(c, -1)
	timeout := time.After(shareWait)
	for !ok {
		select {
		case <-retry:
			ok, retry = s.tryTake(c, amount, by)
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return refuse(busy, "The server is busy with other requests of this tenant, or of all.")
		}
	}
	return nil
}

// countWaiting notes that so many more requests of the caller's tenant wait, and returns how many
// do.
func (s *shares) countWaiting(c Caller, more int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting[c.tenant] += more
	n := s.waiting[c.tenant]
	if n == 0 {
		delete(s.waiting, c.tenant)
	}
	return n
}

// give returns a part.
func (s *shares) give(c Caller, amount int64, by *claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUpFirst(c, by)
	s.taken -= amount
	s.byTenant[c.tenant] -= amount
	if s.byTenant[c.tenant] == 0 {
		delete(s.byTenant, c.tenant) // tenants that left are not remembered
	}
	s.wake()
}

// settle lets another claim take the second half of a share.
func (s *shares) settle(c Caller, by *claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUpFirst(c, by)
	s.wake()
}

func (s *shares) giveUpFirst(c Caller, by *claim) {
	if by != nil && s.first[c.tenant] == by {
		delete(s.first, c.tenant)
	}
}

// wake has those that wait try again.
func (s *shares) wake() {
	close(s.given)
	s.given = make(chan struct{})
}

// claim is what one request holds of its tenant's share of the memory.
type claim struct {
	of     *shares
	caller Caller
	held   int64 // bytes
}

// claimStep is how much more a claim takes at a time, in bytes: a request that grows by rows must
// not count each of them.
const claimStep = 256 << 10

// reach makes the claim at least so many bytes large.
func (c *claim) reach(ctx context.Context, bytes int64) error {
	if bytes <= c.held {
		return nil
	}
	if bytes > c.of.most(c.caller) { // to wait would be in vain
		return refuse(tooLarge, "The request takes more memory than one tenant may have.")
	}
	more := max(bytes-c.held, claimStep)
	more = min(more, c.of.most(c.caller)-c.held)
	if err := c.of.take(ctx, c.caller, more, c); err != nil {
		return err
	}
	c.held += more
	return nil
}

// settle says that the claim does not grow for now.
func (c *claim) settle() { c.of.settle(c.caller, c) }

// release gives everything back.
func (c *claim) release() {
	c.of.give(c.caller, c.held, c)
	c.held = 0
}

// ---- The pool

const (
	// totalPlaces are the requests that work on the database at a time, which keeps a dozen cores
	// busy. A tenant has a third of them: beside two greedy tenants the others have the last third.
	totalPlaces  = 24
	tenantPlaces = totalPlaces / 3

	// poolSize has one connection more, for statements that are prepared while all places are
	// taken. Two servers, with lookupPool and a connection for health each, fit PostgreSQL's
	// default of 100.
	poolSize = totalPlaces + 1
	// lookupPool has the connections for looking up keys alone. A look-up takes a tenth of a
	// millisecond: more of them would mostly compete for processors with the work on data.
	lookupPool = 4

	connectTimeout  = 5 * time.Second  // for a connection to the database
	readyTimeout    = time.Second / 2  // for it to be ready again after an error
	cancelTimeout   = 2 * time.Second  // for PostgreSQL to take a request to cancel a statement
	connMaxLifetime = 30 * time.Minute // retires a connection that went bad

	// statementTimeout ends a statement of the API in PostgreSQL, whatever became of its server.
	statementTimeout = 5 * time.Minute
	// idleTransactionTimeout frees the locks of a client that vanished within a transaction.
	idleTransactionTimeout = time.Minute

	schemaVersion = 5 // of the tables that this program knows; schema.sql writes it down
)

// store is all of timedb's SQL. A method that touches tenant data takes the Caller first after ctx
// and binds its tenant.
type store struct {
	db         *sql.DB
	schema     string
	place      string   // which database it is, for people; no password
	exposed    bool     // whoever sits between here and the database could listen in
	statements sync.Map // of *sql.Stmt by query
	places     *shares  // one for each request that works on the database
	operator   string   // the operating-system user who gave a command

	nodes *store                        // whose connections look at the nodes of Citus
	down  atomic.Pointer[pq.Int64Array] // of them; nil: this is not Citus
}

var errBadDSN = errors.New("the DSN cannot be read: expected " +
	"postgresql://user:password@host:port/database (percent-encode reserved characters of the " +
	"password) or key=value pairs")

// cutOffURL matches a URL of which a ? or # in the password has cut off the host: what is left
// looks like a host and a port.
var cutOffURL = regexp.MustCompile(`^\w+://[^@?#]*[?#].*@`)

// openStore prepares a pool of at most so many connections that see schema alone; it does not
// connect yet. timeout ends a statement on the database's side; 0 means never. What PostgreSQL
// warns of is written to warnings. An error never holds any part of the DSN, as lib/pq's would.
func openStore(dsn, schema string, timeout time.Duration, connections int, warnings io.Writer) (
	*store, error) {
	if os.Getenv("PGSERVICE") != "" {
		return nil, errors.New("PGSERVICE is set and would override the DSN: unset it")
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, errBadDSN
	}
	// A reserved character in the password shifts what follows it.
	if strings.ContainsAny(cfg.Database, "@/?#") || strings.ContainsAny(cfg.Host, "@?#") ||
		cutOffURL.MatchString(dsn) {
		return nil, errBadDSN
	}
	connector, err := pq.NewConnectorConfig(sessionConfig(cfg, schema, timeout))
	if err != nil {
		return nil, errBadDSN
	}
	if timeout > 0 {
		// Later than PostgreSQL would say so itself.
		connector.Dialer(boundedDialer{timeout: timeout + time.Second})
	}
	noisy := pq.ConnectorWithNoticeHandler(connector, func(notice *pq.Error) {
		if notice.Severity == pqerror.SeverityWarning {
			fmt.Fprintln(warnings, "WARNING:", notice.Message)
		}
	})
	places := newShares(totalPlaces, tenantPlaces)
	s := &store{schema: schema, exposed: isExposed(cfg), places: places}
	s.place = fmt.Sprintf("database %q on %s:%d",
		cmp.Or(cfg.Database, cfg.User), cfg.Host, cfg.Port)
	s.db = sql.OpenDB(namingConnector{noisy, s})
	s.db.SetMaxOpenConns(connections)
	s.db.SetMaxIdleConns(connections)
	s.db.SetConnMaxLifetime(connMaxLifetime)
	return s, nil
}

// planForCitus lets Citus plan for the tenant that is asked about: without it there is no node.
// And a node that is down must not keep it.
const planForCitus = `
	SELECT set_config('plan_cache_mode', 'auto', false),
	       set_config('citus.node_connection_timeout', '1000', false)
	FROM pg_extension WHERE extname = 'citus'`

// namingConnector says which database cannot be reached.
type namingConnector struct {
	driver.Connector
	of *store
}

func (n namingConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := n.Connector.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %s: %w", n.of.place, err)
	}
	_, err = conn.(driver.ExecerContext).ExecContext(ctx, planForCitus, nil)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot connect to %s: %w", n.of.place, err)
	}
	return conn, nil
}

// enter waits for a place to work on the database, and bounds that work in time. The returned
// function leaves the place.
func (s *store) enter(ctx context.Context, c Caller) (context.Context, func(), error) {
	if s.isDown(ctx, c) {
		return nil, nil, errNodeDown
	}
	if err := s.places.take(ctx, c, 1, nil); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statementTimeout)
	if s.down.Load() != nil {
		go s.endWhenDown(ctx, c, cancel)
	}
	leave := func() {
		cancel()
		s.places.give(c, 1, nil)
	}
	return ctx, leave, nil
}

// ---- Nodes of Citus: one that does not answer hurts its own tenants alone

// nodePause is between two looks at the nodes. With the second that planForCitus waits for a node,
// and readyTimeout, it is less than shareWait: requests of others outwait those of a frozen node.
const nodePause = time.Second / 2

var errNodeDown = refuse(busy, "The part of the database that has this tenant's data is down.")

// watchNodes notes which nodes take no connection, until ctx ends or if this is not Citus.
func (s *store) watchNodes(ctx context.Context, nodes *store) {
	s.nodes = nodes
	for ctx.Err() == nil {
		var isCitus bool
		var down pq.Int64Array
		err := nodes.oneRow(ctx, nil, `
			SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')`, nil, &isCitus)
		if err == nil && !isCitus {
			return
		}
		err = nodes.inTx(ctx, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, `SET LOCAL citus.max_cached_conns_per_worker = 0;
				SET LOCAL client_min_messages = error`)
			if err != nil {
				return err
			}
			return nodes.oneRow(ctx, tx, `
				SELECT array_agg(groupid) FROM pg_dist_node
				WHERE shouldhaveshards AND noderole = 'primary'
				  AND NOT citus_check_connection_to_node(nodename, nodeport)`, nil, &down)
		})
		if err == nil { // else what was noted last stands
			s.down.Store(&down)
		}
		time.Sleep(nodePause)
	}
}

// isDown tells whether the caller's node takes no connection.
func (s *store) isDown(ctx context.Context, c Caller) (is bool) {
	down := s.down.Load()
	if down == nil || len(*down) == 0 {
		return false
	}
	err := s.nodes.oneRow(ctx, nil, `
		SELECT groupid = ANY ($2) FROM pg_dist_placement
		WHERE shardid = get_shard_id_for_distribution_column('runs_table', $1::uuid)`,
		[]any{c.tenant, *down}, &is)
	return err == nil && is
}

// endWhenDown calls end when the caller's node is found down, until ctx ends.
func (s *store) endWhenDown(ctx context.Context, c Caller, end func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(nodePause / 2):
		}
		if s.isDown(ctx, c) {
			end()
		}
	}
}

// sessionConfig adds to cfg what every session of timedb has.
func sessionConfig(cfg pq.Config, schema string, timeout time.Duration) pq.Config {
	if cfg.SSLMode == "" {
		cfg.SSLMode = pq.SSLModePrefer // as libpq does; lib/pq would require TLS
	}
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, connectTimeout)
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, "timedb")
	cfg.BinaryParameters = true
	cfg.TZ = "UTC"
	cfg = cfg.Clone() // which has room for parameters
	// pg_temp comes last, or temporary tables would hide ours.
	cfg.Runtime["search_path"] = pq.QuoteIdentifier(schema) + ", pg_temp"
	cfg.Runtime["plan_cache_mode"] = "force_generic_plan"
	// A generic plan is made for an average tenant, and one with many series raises that average
	// for all: PostgreSQL would then compile even small reads, start workers, and read the series
	// of all tenants to list those of one.
	cfg.Runtime["jit"] = "off"
	cfg.Runtime["max_parallel_workers_per_gather"] = "0"
	cfg.Runtime["enable_seqscan"] = "off" // there is an index by tenant or series for everything
	// Rows by valid_time come in order from two indexes and are merged: a sort would hold them.
	cfg.Runtime["enable_sort"] = "off"
	cfg.Runtime["statement_timeout"] = milliseconds(timeout)
	cfg.Runtime["idle_in_transaction_session_timeout"] = milliseconds(idleTransactionTimeout)
	return cfg
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// isExposed tells whether whoever sits between here and the database could listen in.
func isExposed(cfg pq.Config) bool {
	if cfg.SSLMode == pq.SSLModeVerifyFull {
		return false
	}
	if len(cfg.Multi) > 0 || cfg.Hostaddr.IsValid() {
		return true
	}
	isSocket := strings.HasPrefix(cfg.Host, "/")
	isLocal := cfg.Host == "localhost" || net.ParseIP(strings.Trim(cfg.Host, "[]")).IsLoopback()
	return !isSocket && !isLocal
}

// boundedDialer connects to a database that may freeze: what is sent to it is taken and answered
// within timeout, or the connection fails.
type boundedDialer struct {
	pq.Dialer // nil: lib/pq calls DialContext alone, because there is one
	timeout   time.Duration
}

func (d boundedDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &boundedConn{Conn: conn, timeout: d.timeout}, nil
}

type boundedConn struct {
	net.Conn
	timeout    time.Duration
	connecting bool // lib/pq has set a deadline of its own, for connecting
}

func (c *boundedConn) SetDeadline(t time.Time) error {
	c.connecting = !t.IsZero()
	return c.Conn.SetDeadline(t)
}

// cancelRequest begins a request to cancel a statement. PostgreSQL answers by hanging up, at once;
// if it is frozen, never. lib/pq waits for that.
var cancelRequest = []byte("\x00\x00\x00\x10\x04\xd2\x16\x2e")

func (c *boundedConn) Write(p []byte) (int, error) {
	timeout := c.timeout
	switch {
	case bytes.HasPrefix(p, cancelRequest):
		timeout = cancelTimeout
	case c.connecting:
		return c.Conn.Write(p)
	}
	if err := c.Conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// errorMark stands in an answer that is an error, in any language.
var errorMark = []byte("\x00VERROR\x00C")

// Read also gives a connection up that is not ready again soon after an error, because a node of
// Citus is frozen: lib/pq would wait for it as long as for any answer. Over TLS it sees no error.
func (c *boundedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		_ = c.Conn.Close()
		return n, err
	}
	if bytes.Contains(p[:n], errorMark) && !c.connecting {
		err = c.Conn.SetDeadline(time.Now().Add(readyTimeout))
	}
	return n, err
}

// prepare prepares query once per connection, for tx unless that is nil. That saves planning it,
// and only so does lib/pq receive bytea in binary form.
func (s *store) prepare(ctx context.Context, tx *sql.Tx, query string) (*sql.Stmt, error) {
	known, found := s.statements.Load(query)
	if !found {
		// #nosec G701 -- a query consists of constants: TestSQLIsNotAssembled
		prepared, err := s.db.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		known, found = s.statements.LoadOrStore(query, prepared)
		if found { // another request was faster
			_ = prepared.Close()
		}
	}
	st := known.(*sql.Stmt)
	if tx != nil {
		st = tx.StmtContext(ctx, st)
	}
	return st, nil
}

// eachRow runs query, in tx unless that is nil, and calls row for each row, to scan it. An error of
// row ends it.
func (s *store) eachRow(ctx context.Context, tx *sql.Tx, query string, args []any,
	row func(*sql.Rows) error) error {
	st, err := s.prepare(ctx, tx, query)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	rows, err := st.QueryContext(ctx, args...)
	if err != nil {
		cancel()
		return err
	}
	defer rows.Close()
	defer cancel() // before the rows are closed, which would fetch all that is left of them
	for rows.Next() {
		if err := row(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// oneRow runs query in tx and scans its one row; without one it returns sql.ErrNoRows.
func (s *store) oneRow(ctx context.Context, tx *sql.Tx, query string, args []any,
	into ...any) error {
	st, err := s.prepare(ctx, tx, query)
	if err != nil {
		return err
	}
	return st.QueryRowContext(ctx, args...).Scan(into...)
}

// change runs a statement in tx for what it does, and returns how many rows that was about.
func (s *store) change(ctx context.Context, tx *sql.Tx, query string, args ...any) (int64, error) {
	st, err := s.prepare(ctx, tx, query)
	if err != nil {
		return 0, err
	}
	result, err := st.ExecContext(ctx, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// inTx runs fn in one transaction and commits when fn returns nil. Otherwise, or when fn panics,
// nothing is stored. An error of the commit itself leaves open whether it took effect: that is what
// a client's own run_id is for. All writes use inTx: outside a transaction database/sql may retry a
// statement whose reply was lost.
func (s *store) inTx(ctx context.Context, fn func(*sql.Tx) error) error {
	// Whatever the role's default: what waited for a lock must see what its holder wrote.
	tx, err := s.db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return err
	}
	defer tx.Rollback() // after the commit it does nothing
	if err := fn(tx); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- tx.Commit() }() // Citus does not end it while a node is frozen
	select {
	case err = <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// exec runs query in a transaction of its own.
func (s *store) exec(ctx context.Context, query string, args ...any) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

// execAll runs sections of schema.sql in one transaction, statement by statement: Citus hands on to
// its nodes the whole text that it was sent.
func (s *store) execAll(ctx context.Context, sections string) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		statement := ""
		for part := range strings.SplitAfterSeq(sections, ";\n") {
			statement += part
			if strings.Count(statement, "$timedb$")%2 == 1 {
				continue // within the body of a DO or a function
			}
			if _, err := tx.ExecContext(ctx, statement); err != nil {
				return err
			}
			statement = ""
		}
		if statement != "" {
			return errors.New("schema.sql: a section ends within a statement")
		}
		return nil
	})
}

// asJSON is v, which JSON can show: also as a bound argument that SQL unpacks. Escaped for HTML, a
// text could take six times the memory that it was counted with.
func asJSON(v any) string {
	var text bytes.Buffer
	out := json.NewEncoder(&text)
	out.SetEscapeHTML(false)
	if err := out.Encode(v); err != nil {
		panic(err) // a bug
	}
	return strings.TrimSuffix(text.String(), "\n")
}

// ---- The catalog

// schemaSections returns the wanted sections of schema.sql, in the file's order, with quoted
// identifiers in place of the placeholders.
func schemaSections(schema, role string, wanted map[string]bool) string {
	var text strings.Builder
	for _, section := range strings.Split(schemaSQL, "-- section: ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		if wanted[name] {
			text.WriteString("\n" + strings.TrimSpace(body) + "\n")
		}
	}
	identifiers := strings.NewReplacer(
		":schema", pq.QuoteIdentifier(schema), ":app_role", pq.QuoteIdentifier(role))
	return identifiers.Replace(text.String())
}

// catalog is what there is of timedb in the store's schema. It is read from pg_class, which lists
// relations that this role may not use as well: a name that is missing is really absent.
type catalog struct {
	names    pq.StringArray // of tables and views
	version  int            // of the tables; 1 if they do not tell, 0 if there are none
	lacks    bool           // the role may not read what the API reads
	rewrites bool           // it could change or delete stored data, itself or as another role
}

func (s *store) catalog(ctx context.Context) (catalog, error) {
	var c catalog
	err := s.eachRow(ctx, nil, `
		SELECT array_agg(DISTINCT c.relname::text),
		       coalesce(max(coalesce(substring(obj_description(c.oid, 'pg_class')
		           FROM 'timedb schema (\d+)'), '1')::integer)
		           FILTER (WHERE c.relname = 'runs_table'), 0),
		       bool_or(c.relname <> 'audit_table' AND NOT (has_schema_privilege(n.oid, 'USAGE')
		           AND has_table_privilege(c.oid, 'SELECT'))),
		       bool_or(has_schema_privilege(r.oid, n.oid, 'CREATE') OR r.rolcreaterole
		           OR has_table_privilege(r.oid, c.oid, 'DELETE, TRUNCATE')
		           OR c.relname <> 'key_uses' AND has_any_column_privilege(r.oid, c.oid, 'UPDATE')
		           OR c.relname IN ('users_table', 'keys_table', 'audit_table')
		              AND has_table_privilege(r.oid, c.oid, 'INSERT'))
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		JOIN pg_catalog.pg_roles r ON pg_has_role(r.oid, 'MEMBER')
		WHERE n.nspname = $1 AND c.relname IN
		      ('runs_table', 'series_table', 'values_table', 'withdrawals_table', 'value_blocks',
		       'current_values', 'audit_table', 'users_table', 'keys_table', 'key_uses')
		HAVING count(*) > 0`,
		[]any{s.schema}, func(rows *sql.Rows) error {
			return rows.Scan(&c.names, &c.version, &c.lacks, &c.rewrites)
		})
	return c, err
}

// check returns an error unless the tables, if there are any, are of this program's version.
func (c catalog) check() error {
	if c.version == 0 || c.version == schemaVersion {
		return nil
	}
	return fmt.Errorf("the tables are of schema version %d and this timedb is for %d: run timedb "+
		"create tables if they are older, or else the timedb that made them",
		c.version, schemaVersion)
}

// UsersTableExists: true is present, false is proven absent, an error is neither.
func (s *store) UsersTableExists(ctx context.Context) (bool, error) {
	c, err := s.catalog(ctx)
	return slices.Contains(c.names, "users_table"), err
}

// ---- Users and their keys

// user is a row of users_table as an operator sees it.
type user struct {
	ID        string     `json:"user_id"`
	Tenant    string     `json:"tenant_id"`
	Email     string     `json:"email"`
	Active    bool       `json:"is_active"`
	LiveKeys  int        `json:"live_keys"`
	LastUsed  *time.Time `json:"last_used_at"` // of any of the keys
	CreatedAt time.Time  `json:"created_at"`
}

// key is a row of keys_table as an operator sees it: without its digest.
type key struct {
	ID        string     `json:"key_id"`
	Tenant    string     `json:"tenant_id"`
	Email     string     `json:"email"`
	Name      string     `json:"name"`
	Access    string     `json:"access"` // rw or ro
	Status    string     `json:"status"` // active, ends soon, or why it does not work
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt *time.Time `json:"expires_at"`
	RevokedAt *time.Time `json:"revoked_at"`
	LastUsed  *time.Time `json:"last_used_at"`

	userID string
}

// String is k in the audit trail.
func (k *key) String() string {
	return fmt.Sprintf("key %s, %q, %s, ends %s", k.ID, k.Name, k.Access, showTime(k.ExpiresAt))
}

// LookupKey finds the key of this digest and its user, in whatever state: auth.go judges.
func (s *store) LookupKey(ctx context.Context, digest []byte) (keyRecord, error) {
	var k keyRecord
	err := s.eachRow(ctx, nil, `
		SELECT k.key_id, u.tenant_id, u.email, k.access = 'ro', u.is_active, k.key_digest,
		       k.replaced_by IS NOT NULL, k.has_grace, clock_timestamp(), k.expires_at,
		       k.revoked_at
		FROM (SELECT * FROM keys_table WHERE key_digest = $1 OFFSET 0) AS k  -- first, by its index
		JOIN users_table u USING (tenant_id, user_id)`,
		[]any{digest}, func(rows *sql.Rows) error {
			return rows.Scan(&k.id, &k.tenant, &k.email, &k.readOnly, &k.active, &k.digest,
				&k.replaced, &k.inGrace, &k.now, &k.expiresAt, &k.revokedAt)
		})
	return k, err
}

// TouchKey notes that a key was used now.
func (s *store) TouchKey(ctx context.Context, keyID string) error {
	return s.exec(ctx, `
		INSERT INTO key_uses VALUES ($1, clock_timestamp())
		ON CONFLICT (key_id) DO UPDATE SET last_used_at = clock_timestamp()`, keyID)
}

// insertKey stores k with its digest.
func insertKey(ctx context.Context, tx *sql.Tx, k *key, digest []byte) error {
	_, err := tx.ExecContext(ctx, `
		INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access, expires_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7)`,
		k.ID, k.Tenant, k.userID, k.Name, digest, k.Access, k.ExpiresAt)
	if sqlState(err) == uniqueViolation {
		return fmt.Errorf("the user has a key of the name '%s' already", k.Name)
	}
	return err
}

// CreateUser makes a user with a first key, and sets their user_id. An email is unique in its
// tenant.
func (s *store) CreateUser(ctx context.Context, u *user, k *key, digest []byte) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `
			INSERT INTO users_table (tenant_id, email) VALUES ($1, $2) RETURNING user_id`,
			u.Tenant, u.Email).Scan(&u.ID)
		if sqlState(err) == uniqueViolation {
			//lint:ignore ST1005 the contract quotes this sentence
			return fmt.Errorf("User with email '%s' already exists for this tenant.", u.Email)
		}
		if err != nil {
			return err
		}
		k.userID = u.ID
		if err := insertKey(ctx, tx, k, digest); err != nil {
			return err
		}
		return s.audit(ctx, tx, auditLine{"users create", u.Tenant, u.Email, k.String()})
	})
}

// Users lists users by tenant and email. An empty tenant or email means all.
func (s *store) Users(ctx context.Context, tenant uuid, email string) ([]user, error) {
	keys, err := s.Keys(ctx, nil, tenant, email)
	if err != nil {
		return nil, err
	}
	users := []user{}
	err = s.eachRow(ctx, nil, `
		SELECT user_id, tenant_id, email, is_active, created_at
		FROM users_table
		WHERE ($1 = '' OR tenant_id = nullif($1, '')::uuid)
		  AND ($2 = '' OR lower(email) = lower($2))
		ORDER BY tenant_id, lower(email)`,
		[]any{tenant, email}, func(rows *sql.Rows) error {
			var u user
			err := rows.Scan(
				&u.ID, &u.Tenant, &u.Email,
				&u.Active, &u.CreatedAt)
			users = append(users, u)
			return err
		})
	for i := range users {
		u := &users[i]
		for _, k := range keys {
			if k.userID != u.ID {
				continue
			}
			if k.Status == statusActive || k.Status == statusEndsSoon {
				u.LiveKeys++
			}
			if u.LastUsed == nil || k.LastUsed != nil && k.LastUsed.After(*u.LastUsed) {
				u.LastUsed = k.LastUsed
			}
		}
	}
	return users, err
}

// endsSoon is how long before its end a key is said to end soon.
const endsSoon = 14 * 24 * time.Hour

// What Status is while a key works.
const (
	statusActive   = "active"
	statusEndsSoon = "ends soon"
)

// Keys lists keys by tenant and email of their users, in tx unless that is nil. An empty tenant or
// email means all.
func (s *store) Keys(ctx context.Context, tx *sql.Tx, tenant uuid, email string) ([]key, error) {
	keys := []key{}
	err := s.eachRow(ctx, tx, `
		SELECT k.key_id, k.tenant_id, k.user_id, u.email, k.name, k.access, u.is_active,
		       k.replaced_by IS NOT NULL, k.has_grace, clock_timestamp(), k.created_at,
		       k.expires_at, k.revoked_at, used.last_used_at
		FROM keys_table k JOIN users_table u USING (tenant_id, user_id)
		LEFT JOIN key_uses used USING (key_id)
		WHERE ($1 = '' OR k.tenant_id = nullif($1, '')::uuid)
		  AND ($2 = '' OR lower(u.email) = lower($2))
		ORDER BY k.tenant_id, lower(u.email), k.created_at, k.key_id`,
		[]any{tenant, email}, func(rows *sql.Rows) error {
			var k key
			var facts keyRecord
			err := rows.Scan(
				&k.ID, &k.Tenant, &k.userID,
				&k.Email, &k.Name, &k.Access,
				&facts.active, &facts.replaced,
				&facts.inGrace, &facts.now,
				&k.CreatedAt, &k.ExpiresAt,
				&k.RevokedAt, &k.LastUsed)
			facts.expiresAt = k.ExpiresAt
			facts.revokedAt = k.RevokedAt
			k.Status = facts.fault()
			if k.Status == "" {
				k.Status = statusActive
			}
			facts.now = facts.now.Add(endsSoon)
			if k.Status == statusActive && facts.fault() != "" {
				k.Status = statusEndsSoon
			}
			keys = append(keys, k)
			return err
		})
	return keys, err
}

// CreateKey makes a further key of a user.
func (s *store) CreateKey(ctx context.Context, k *key, digest []byte) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		if err := insertKey(ctx, tx, k, digest); err != nil {
			return err
		}
		return s.audit(ctx, tx, auditLine{"keys create", k.Tenant, k.Email, k.String()})
	})
}

// RevokeKey refuses a key from now on, on every server.
func (s *store) RevokeKey(ctx context.Context, k *key) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		return s.changeOne(ctx, tx, auditLine{"keys revoke", k.Tenant, k.Email, k.String()}, `
			UPDATE keys_table SET revoked_at = clock_timestamp(), has_grace = false,
			       replaced_by = NULL
			WHERE key_id = $1 AND (revoked_at IS NULL OR has_grace)`, k.ID)
	})
}

// ReplaceKeys gives a user the new key k in place of all others, which work on for grace, unless
// they end sooner. k gets the widest access and the latest end that they had, or ends unless that
// is 0.
func (s *store) ReplaceKeys(ctx context.Context, k *key, digest []byte, grace span,
	ends expiry) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		var active bool
		err := tx.QueryRowContext(ctx, `
			SELECT is_active FROM users_table WHERE user_id = $1 FOR UPDATE`,
			k.userID).Scan(&active)
		if err != nil {
			return err
		}
		if !active {
			grace = 0 // or activating the user would bring them back to life
		}
		keys, err := s.Keys(ctx, tx, uuid(k.Tenant), k.Email)
		if err != nil {
			return err
		}
		if err := k.inherit(keys, ends); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `
			UPDATE keys_table SET revoked_at = ends, has_grace = $3::bigint > 0, replaced_by = $2
			FROM (SELECT clock_timestamp() + $3::bigint * interval '1 microsecond') AS grace (ends)
			WHERE user_id = $1 AND (revoked_at IS NULL OR has_grace AND revoked_at > ends)`,
			k.userID, k.ID, int64(grace))
		if err != nil {
			return err
		}
		if err := insertKey(ctx, tx, k, digest); err != nil {
			return err
		}
		detail := fmt.Sprintf("%s, after a grace of %s", k, time.Duration(grace)*time.Microsecond)
		return s.audit(ctx, tx, auditLine{"users regenerate-key", k.Tenant, k.Email, detail})
	})
}

// inherit sets the access and the end of k, which comes in place of the keys that work: those that
// have neither ended nor been replaced before. Expired ones count if there is no other.
func (k *key) inherit(keys []key, ends expiry) error {
	keys = slices.DeleteFunc(keys, func(old key) bool { return old.RevokedAt != nil })
	if len(keys) == 0 {
		return errors.New("the user has no key to replace: use timedb keys create")
	}
	isExpired := func(old key) bool { return old.Status == "expired" }
	if !slices.ContainsFunc(keys, func(old key) bool { return !isExpired(old) }) {
		if ends == 0 {
			return errors.New("the user's keys have expired: pass --expires")
		}
	} else {
		keys = slices.DeleteFunc(keys, isExpired)
	}
	k.Access = "ro"
	k.ExpiresAt = keys[0].ExpiresAt
	for _, old := range keys {
		if old.Access == "rw" {
			k.Access = "rw"
		}
		if old.ExpiresAt == nil || k.ExpiresAt != nil && old.ExpiresAt.After(*k.ExpiresAt) {
			k.ExpiresAt = old.ExpiresAt
		}
	}
	if ends != 0 {
		k.ExpiresAt = ends.time()
	}
	return nil
}

// ActivateUser admits the keys of a user again. From its return on every server sees it.
func (s *store) ActivateUser(ctx context.Context, u *user) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		return s.changeOne(ctx, tx, auditLine{"users activate", u.Tenant, u.Email, ""},
			`UPDATE users_table SET is_active = true WHERE user_id = $1`, u.ID)
	})
}

// DeactivateUser refuses the keys of a user. A key that was in its grace has ended for good.
func (s *store) DeactivateUser(ctx context.Context, u *user) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		// This first: it waits for a replacement of keys that has begun, whose graces end next.
		err := s.changeOne(ctx, tx, auditLine{"users deactivate", u.Tenant, u.Email, ""},
			`UPDATE users_table SET is_active = false WHERE user_id = $1`, u.ID)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `
			UPDATE keys_table SET revoked_at = clock_timestamp(), has_grace = false
			WHERE user_id = $1 AND has_grace AND revoked_at > clock_timestamp()`, u.ID)
		return err
	})
}

// auditLine is one administrative change, for audit_table.
type auditLine struct {
	action string // the command, such as "keys revoke"
	tenant string // whose; "" if it is about all
	email  string // of the user whom it is about; "" if it is about none
	detail string
}

// audit writes down what tx changes. The database adds its role, the moment and its name.
func (s *store) audit(ctx context.Context, tx *sql.Tx, line auditLine) error {
	_, err := tx.ExecContext(ctx, `
		INSERT INTO audit_table (os_user, action, tenant_id, email, detail)
		VALUES ($1, $2, nullif($3, '')::uuid, nullif($4, ''), $5)`,
		s.operator, line.action, line.tenant, line.email, line.detail)
	return err
}

// changeOne runs a statement that changes one row, and writes its line of the trail.
func (s *store) changeOne(ctx context.Context, tx *sql.Tx, line auditLine, query string,
	id string) error {
	n, err := s.change(ctx, tx, query, id)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("it is not there any more, or was revoked already")
	}
	return s.audit(ctx, tx, line)
}

// auditEntry is a line of the trail as it is read.
type auditEntry struct {
	At     time.Time `json:"at"`
	Role   string    `json:"db_role"`
	OSUser string    `json:"os_user"`
	Action string    `json:"action"`
	Tenant string    `json:"tenant_id"`
	Email  string    `json:"email"`
	Detail string    `json:"detail"`
}

// AuditTrail returns the trail of a tenant, "" for all, since a moment, oldest first.
func (s *store) AuditTrail(ctx context.Context, tenant uuid, since timestamp) (
	[]auditEntry, error) {
	trail := []auditEntry{}
	err := s.eachRow(ctx, nil, `
		SELECT at, db_role, os_user, action, coalesce(tenant_id::text, ''), coalesce(email, ''),
		       detail FROM audit_table
		WHERE ($1 = '' OR tenant_id = nullif($1, '')::uuid) AND at >= $2 ORDER BY audit_id`,
		[]any{tenant, since}, func(rows *sql.Rows) error {
			var e auditEntry
			err := rows.Scan(
				&e.At, &e.Role, &e.OSUser,
				&e.Action, &e.Tenant, &e.Email, &e.Detail)
			trail = append(trail, e)
			return err
		})
	return trail, err
}

// ---- Series

const defaultUnit = "dimensionless" // of a series that an upload creates

type series struct{ ID, Key, Unit string }

// seriesRef names a series by id, by key, or by both. Given is the key with the white space that
// was around it: by it a key is found that was stored before keys were trimmed.
type seriesRef struct {
	ID    uuid   `json:"id"`
	Key   label  `json:"key"`
	Given string `json:"given"` // "": as Key
}

func (seriesRef) expected() string { return label("").expected() }

// UnmarshalText reads a key.
func (r *seriesRef) UnmarshalText(text []byte) error {
	err := r.Key.UnmarshalText(text)
	if len(r.Key) < len(text) {
		r.Given = string(text)
	}
	return err
}

// noSeries is the error of a reference to nothing.
func noSeries(ref seriesRef) error {
	if ref.ID != "" {
		return refuse(notFound, "series_id: there is no series %q", ref.ID)
	}
	return refuse(notFound, "series_key: there is no series %q", ref.Key)
}

// findSeries returns the series that each ref names, of the caller's tenant. One that does not
// exist is notFound, an id with another key than the one given invalid.
func (s *store) findSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef) (
	[]series, error) {
	found, unknown, err := s.lookUpSeries(ctx, c, tx, refs)
	if err == nil && len(unknown) > 0 {
		return nil, s.suggestSeries(ctx, c, tx, unknown[0])
	}
	return found, err
}

const (
	// seriesOfRef is the series that ref names by id or key, if there is one. A key that was
	// trimmed is looked up as it was given first: UNION ALL comes in the order in which it is
	// written, and sorting would take longer than the look-ups.
	seriesOfRef = `(
			SELECT * FROM series_table
			WHERE tenant_id = $1 AND series_key = nullif(ref.given, '') AND ref.id = ''
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_key = ref.key AND ref.id = ''
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_id = nullif(ref.id, '')::uuid
			LIMIT 1
		) AS s`

	selectSeries = `
		SELECT coalesce(s.series_id::text, ''), coalesce(s.series_key, ''), coalesce(s.unit, '')
		FROM unnest($2::text[], $3::text[], $4::text[])
		     WITH ORDINALITY AS ref (id, key, given, number)
		LEFT JOIN LATERAL ` + seriesOfRef + ` ON true
		ORDER BY ref.number`
)

// lookUpSeries is findSeries, but for what does not exist: that has no id and is listed as unknown.
func (s *store) lookUpSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef) (
	found []series, unknown []seriesRef, err error) {
	var ids, keys, given []string
	for _, ref := range refs {
		ids = append(ids, string(ref.ID))
		keys = append(keys, string(ref.Key))
		given = append(given, ref.Given)
	}
	found = []series{} // not nil, which JSON shows as null
	err = s.eachRow(ctx, tx, selectSeries,
		[]any{
			c.tenant,
			pq.Array(ids), pq.Array(keys), pq.Array(given),
		},
		func(rows *sql.Rows) error {
			var x series
			if err := rows.Scan(&x.ID, &x.Key, &x.Unit); err != nil {
				return err
			}
			ref := refs[len(found)]
			found = append(found, x)
			switch {
			case x.ID == "":
				unknown = append(unknown, ref)
			case ref.Key != "" && x.Key != string(ref.Key) && x.Key != ref.Given:
				return invalid("series_id: %s is not the series %q", ref.ID, ref.Key)
			}
			return nil
		})
	return found, unknown, err
}

// maxSuggested is how many keys are compared to suggest one, which takes some 50 ms.
const maxSuggested = 100_000

// suggestSeries is noSeries with the key of the caller's tenant that was probably meant.
func (s *store) suggestSeries(ctx context.Context, c Caller, tx *sql.Tx, ref seriesRef) error {
	if ref.ID != "" {
		return noSeries(ref)
	}
	nearest := ""
	err := s.eachRow(ctx, tx, `
		SELECT series_key FROM series_table WHERE tenant_id = $1 ORDER BY series_key LIMIT $2`,
		[]any{c.tenant, maxSuggested}, func(rows *sql.Rows) error {
			var key string
			err := rows.Scan(&key)
			nearest = nearestName(string(ref.Key), []string{nearest, key})
			return err
		})
	switch {
	case err != nil:
		return err
	case nearest == "":
		return noSeries(ref)
	}
	return refuse(notFound, "series_key: there is no series %q; did you mean %q?", ref.Key, nearest)
}

// ensureSeries returns the series that each ref names, after creating those named by a key that is
// new, and how many it created. They are inserted in one order whoever inserts, so that two uploads
// of the same series cannot deadlock.
func (s *store) ensureSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef,
	unit label, about descriptions) (found []series, created int64, err error) {
	found, unknown, err := s.lookUpSeries(ctx, c, tx, refs)
	if err != nil || len(unknown) == 0 {
		return found, 0, err
	}
	slices.SortFunc(unknown, func(a, b seriesRef) int {
		return cmp.Compare(a.Key, b.Key)
	})
	first := unknown[0]
	created, err = s.change(ctx, tx, `
		INSERT INTO series_table (tenant_id, series_key, unit, description)
		VALUES ($1, $2, $3, nullif($4, '')) ON CONFLICT (tenant_id, series_key) DO NOTHING`,
		c.tenant, first.Key, unit, about[first.Key])
	if err == nil && len(unknown) > 1 {
		var n int64
		n, err = s.createBeside(ctx, c, tx, first.Key, unknown[1:], unit, about)
		created += n
	}
	if err != nil {
		return nil, 0, err
	}
	found, err = s.findSeries(ctx, c, tx, refs)
	return found, created, err
}

// createBeside creates series beside the first, in one statement on one node: see stamp.
func (s *store) createBeside(ctx context.Context, c Caller, tx *sql.Tx, first label,
	refs []seriesRef, unit label, about descriptions) (created int64, err error) {
	var now time.Time
	var ids pq.StringArray
	err = s.oneRow(ctx, tx, `
		SELECT clock_timestamp(), ARRAY(SELECT gen_random_uuid() FROM generate_series(1, $1))`,
		[]any{len(refs)}, &now, &ids)
	if err != nil {
		return 0, err
	}
	var keys []string
	for _, ref := range refs {
		keys = append(keys, string(ref.Key))
	}
	return s.change(ctx, tx, `
		INSERT INTO series_table (tenant_id, series_id, series_key, unit, description, inserted_at)
		SELECT s.tenant_id, n.id, n.key, $3, nullif($4::jsonb ->> n.key, ''), $5::timestamptz
		FROM series_table s, unnest($6::uuid[], $7::text[]) AS n (id, key)
		WHERE s.tenant_id = $1 AND s.series_key = $2
		ORDER BY n.key COLLATE "C"
		ON CONFLICT (tenant_id, series_key) DO NOTHING`,
		c.tenant, first, unit, asJSON(about), now, ids, pq.Array(keys))
}

// CreateSeries makes a series or finds the one of that key. created tells which. Another unit is a
// conflict, and so is another description, unless it is nil.
func (s *store) CreateSeries(ctx context.Context, c Caller, ref seriesRef, unit label,
	description *prose) (id string, created bool, err error) {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return "", false, err
	}
	defer leave()
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		about := descriptions{}
		if description != nil {
			about[ref.Key] = *description
		}
		found, n, err := s.ensureSeries(ctx, c, tx, []seriesRef{ref}, unit, about)
		if err != nil {
			return err
		}
		if found[0].Unit != string(unit) {
			return refuse(conflict, "unit: the series %q exists with the unit %q",
				ref.Key, found[0].Unit)
		}
		id = found[0].ID
		created = n == 1
		if description == nil {
			return nil
		}
		var described prose
		err = tx.QueryRowContext(ctx, `
			SELECT coalesce(description, '') FROM series_table
			WHERE tenant_id = $1 AND series_id = $2`, c.tenant, id).Scan(&described)
		if err == nil && described != *description {
			return refuse(conflict, "description: the series %q exists with the description %q",
				ref.Key, described)
		}
		return err
	})
	return id, created, err
}

// seriesChange is what becomes of a series. What is "" or nil stays.
type seriesChange struct {
	key, unit   label
	description *prose
}

// lockedSeries shows a series, and keeps others from changing it. On Citus no UPDATE may join.
const lockedSeries = `
	SELECT json_build_array(series_key, unit, description) FROM series_table
	WHERE tenant_id = $1 AND series_id = $2 FOR UPDATE`

// UpdateSeries changes a series, and returns what it was and what it became.
func (s *store) UpdateSeries(ctx context.Context, c Caller, ref seriesRef, change seriesChange) (
	changed string, err error) {
	found, err := s.findSeries(ctx, c, nil, []seriesRef{ref})
	if err != nil {
		return "", err
	}
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		var before, after string
		id := found[0].ID
		err := tx.QueryRowContext(ctx, lockedSeries, c.tenant, id).Scan(&before)
		if errors.Is(err, sql.ErrNoRows) {
			return noSeries(ref)
		}
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `
			UPDATE series_table SET series_key = coalesce(nullif($3, ''), series_key),
			       unit = coalesce(nullif($4, ''), unit),
			       description = CASE WHEN $5::text IS NULL THEN description
			                          ELSE nullif($5, '') END
			WHERE tenant_id = $1 AND series_id = $2`,
			c.tenant, id, change.key, change.unit, change.description)
		if sqlState(err) == uniqueViolation {
			return fmt.Errorf("a series %q exists already; nothing was changed", change.key)
		}
		if err == nil {
			err = tx.QueryRowContext(ctx, lockedSeries, c.tenant, id).Scan(&after)
		}
		if err != nil {
			return err
		}
		changed = fmt.Sprintf("%s: %s became %s", id, before, after)
		return s.audit(ctx, tx,
			auditLine{action: "series update", tenant: c.tenant, detail: changed})
	})
	return changed, err
}

// ---- Uploads

// point is one value at its time. A NULL value is NaN: no NaN is ever stored.
type point struct {
	time  timestamp
	end   timestamp // 0: the value has no end of its own
	value float64
}

func comparePoints(a, b point) int {
	return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.end, b.end))
}

// seriesRows are the rows of one series, as they were sent.
type seriesRows struct {
	points  []point
	numbers []int32 // where in the request each row stands
}

// upload is one run with its values.
type upload struct {
	runID                uuid // "": the database makes one
	workflowID           label
	start, finish, known timestamp // may be 0
	params               object    // or nil
	descriptions         descriptions
	createSeries         bool // those that are new; false: they are refused
	series               map[seriesRef]*seriesRows
	rows                 int
	list                 string // what the numbers of rows count
	digest               []byte // of the request, to tell a retry from a clash
}

// Upload stores a run and its values, all or nothing, sets u.runID, and returns the ids of its
// series by key. The same run_id with the same digest answers as the first time and stores
// nothing; with another digest it is a conflict.
func (s *store) Upload(ctx context.Context, c Caller, u *upload) (map[string]string, error) {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return nil, err
	}
	defer leave()
	ids := make(map[string]string, len(u.series))
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		// The series first: as of the run's change_time they must exist.
		refs := slices.AppendSeq([]seriesRef{}, maps.Keys(u.series))
		var found []series
		var created int64
		var err error
		if u.createSeries {
			found, created, err = s.ensureSeries(ctx, c, tx, refs, defaultUnit, u.descriptions)
		} else {
			found, err = s.findSeries(ctx, c, tx, refs)
		}
		if err != nil {
			return err
		}
		rows := make(map[series][]*seriesRows, len(found))
		for i, x := range found {
			ids[x.Key] = x.ID
			rows[x] = append(rows[x], u.series[refs[i]]) // two refs may name one series
		}
		blocks, err := cutBlocks(u.list, rows)
		if err != nil {
			return err
		}
		now, valueIDs, err := s.stamp(ctx, tx, len(blocks))
		if err != nil {
			return err
		}
		isNew, err := s.insertRun(ctx, c, tx, u, now)
		if err == nil && !isNew && created > 0 {
			err = refuse(notFound, "run_id %s is stored already, and a series of it was erased or "+
				"renamed since", u.runID)
		}
		if err != nil || !isNew {
			return err
		}
		return s.insertBlocks(ctx, c, tx, u.runID, blocks, valueIDs)
	})
	return ids, err
}

// stamp is what the database gives a write beforehand: the moment, and ids for so many rows of
// values_table. An INSERT that has them needs nothing but the tenant's node, and Citus commits it
// in one phase. Else it would commit in two, of which the second may fail after the answer.
func (s *store) stamp(ctx context.Context, tx *sql.Tx, rows int) (
	now timestamp, ids pq.Int64Array, err error) {
	var t time.Time
	err = s.oneRow(ctx, tx, `
		SELECT clock_timestamp(),
		       ARRAY(SELECT nextval('values_table_value_id_seq') FROM generate_series(1, $1))`,
		[]any{rows}, &t, &ids)
	return timestampOf(t), ids, err
}

// insertRun stores the run's own row and sets u.runID if the client did not. isNew is false if this
// request was stored before.
func (s *store) insertRun(ctx context.Context, c Caller, tx *sql.Tx, u *upload, now timestamp) (
	isNew bool, err error) {
	err = s.oneRow(ctx, tx, `
		INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, run_finish_time,
		       known_time, run_params, rows_inserted, request_digest, changed_by, inserted_at)
		VALUES ($1, coalesce(nullif($2, '')::uuid, gen_random_uuid()), $3,
		        coalesce($4::timestamptz, $6, $11), $5, coalesce($6::timestamptz, $11),
		        nullif($7, '')::json, $8, $9, nullif($10, ''), $11)
		ON CONFLICT (tenant_id, run_id) DO NOTHING RETURNING run_id`,
		[]any{
			c.tenant, u.runID, u.workflowID,
			u.start, u.finish, u.known,
			string(u.params), u.rows,
			u.digest, c.email, now,
		}, &u.runID)
	if sqlState(err) == "54001" { // statement_too_complex
		return false, invalid("run_params is nested too deep for PostgreSQL")
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return err == nil, err
	}
	var isSame bool
	err = tx.QueryRowContext(ctx, `
		SELECT request_digest = $3 FROM runs_table WHERE tenant_id = $1 AND run_id = $2`,
		c.tenant, u.runID, u.digest).Scan(&isSame)
	if errors.Is(err, sql.ErrNoRows) {
		return false, errErased
	}
	if err == nil && !isSame {
		err = refuse(conflict, "run_id %s was already used for a different request", u.runID)
	}
	return false, err
}

// errErased is the error of a write that an erasure came before: nothing of it is stored.
var errErased = refuse(notFound, "The run or a series was erased just now. Nothing was stored.")

const (
	// A block is one row of values_table; schema.sql checks both bounds. 1,000 values make a row's
	// overhead of some 200 bytes vanish beside them. 32 days bound how far before a window the
	// read of that window must start.
	maxBlockValues = 1000
	maxBlockSpan   = timestamp(32 * day)

	// One INSERT has so many points, which are some megabytes of parameters, and so many blocks:
	// to find where a block begins, PostgreSQL counts from the first point, if any is NULL.
	pointsPerStatement = 100_000
	blocksPerStatement = 1000
)

// block is what one row of values_table holds: points of one series in order.
type block struct {
	seriesID string
	points   []point
}

// cutBlocks sorts the points of each series and cuts them into blocks. A point that occurs twice is
// invalid.
func cutBlocks(list string, bySeries map[series][]*seriesRows) ([]block, error) {
	var blocks []block
	for of, parts := range bySeries {
		var points []point
		for _, part := range parts {
			points = append(points, part.points...)
		}
		slices.SortFunc(points, comparePoints) // quick on what is in order
		begin := 0
		for i, p := range points {
			if i > 0 && comparePoints(points[i-1], p) == 0 {
				return nil, invalid("%s[%d]: valid_time %s occurs twice for series %q; a time "+
					"without an offset is taken for UTC", list, secondRow(parts, p), p.time, of.Key)
			}
			if i-begin == maxBlockValues || p.time-points[begin].time > maxBlockSpan {
				blocks = append(blocks, block{of.ID, points[begin:i]})
				begin = i
			}
		}
		blocks = append(blocks, block{of.ID, points[begin:]})
	}
	return blocks, nil
}

// secondRow is where the point p, which occurs twice or more, occurs for the second time.
func secondRow(parts []*seriesRows, p point) int32 {
	var numbers []int32
	for _, part := range parts {
		for i, other := range part.points {
			if comparePoints(other, p) == 0 {
				numbers = append(numbers, part.numbers[i])
			}
		}
	}
	slices.Sort(numbers)
	return numbers[1]
}

// insertBlocks stores blocks of a run: in each statement the values of several end to end in three
// arrays, and for each block where in these it begins and ends, counted from 1. A block whose run
// or series is gone is not stored, and then nothing is.
func (s *store) insertBlocks(ctx context.Context, c Caller, tx *sql.Tx, run uuid, blocks []block,
	valueIDs pq.Int64Array) error {
	for len(blocks) > 0 {
		var series []string
		var first, last []int64
		var points []point
		for len(blocks) > 0 && len(series) < blocksPerStatement &&
			len(points) < pointsPerStatement {
			series = append(series, blocks[0].seriesID)
			first = append(first, int64(len(points)+1))
			points = append(points, blocks[0].points...)
			last = append(last, int64(len(points)))
			blocks = blocks[1:]
		}
		ids := valueIDs[:len(series)]
		valueIDs = valueIDs[len(series):]
		stored, err := s.change(ctx, tx, `
			INSERT INTO values_table (tenant_id, series_number, run_id, value_id, run_order,
			       version, known_time, change_time, changed_by, valid_time_ends, valid_from, value,
			       valid_to, valid_times, "values") OVERRIDING SYSTEM VALUE
			SELECT r.tenant_id, s.series_number, r.run_id, b.value_id, r.run_order, 1, r.known_time,
			       r.inserted_at, r.changed_by,
			       CASE WHEN num_nonnulls(VARIADIC a.ends[b.first:b.last]) > 0
			            THEN a.ends[b.first:b.last] END,
			       a.times[b.first],
			       CASE WHEN b.first = b.last THEN a."values"[b.first] END,
			       CASE WHEN b.first < b.last THEN a.times[b.last] END,
			       CASE WHEN b.first < b.last THEN a.times[b.first:b.last] END,
			       CASE WHEN b.first < b.last THEN a."values"[b.first:b.last] END
			FROM runs_table r,
			     (SELECT $3::timestamptz[], $4::timestamptz[], $5::float8[])
			         AS a (times, ends, "values"),
			     unnest($6::uuid[], $7::integer[], $8::integer[], $9::bigint[])
			         AS b (series_id, first, last, value_id)
			     CROSS JOIN LATERAL (
				SELECT series_number FROM series_table
				WHERE tenant_id = $1 AND series_id = b.series_id OFFSET 0) AS s
			WHERE r.tenant_id = $1 AND r.run_id = $2`,
			c.tenant, run, encodeTimes(points), encodeEnds(points), encodeValues(points),
			pq.Array(series), pq.Array(first), pq.Array(last), ids)
		if err != nil {
			return err
		}
		if stored < int64(len(series)) {
			return errErased
		}
	}
	return nil
}

// ---- Arrays in PostgreSQL's binary form (array_send in src/backend/utils/adt/arrayfuncs.c):
// number of dimensions, whether there may be NULLs, the element type's oid, the length, the lower
// bound, then of each element its length in bytes, or -1 for NULL, and its bytes; all big-endian.
// Here every element is 8 bytes: a timestamptz or a float8, as its bits.

const (
	oidTimestamptz = 1184
	oidFloat8      = 701
	arrayHeader    = 20
	elementLength  = 8
	nullLength     = math.MaxUint32 // -1

	nullBits = 0x7ff8000000000001 // of math.NaN(), which stands for NULL; no timestamp has them
)

// encodeArray returns an array of the element type oid with one element for each point: the bits
// that element returns, or NULL.
func encodeArray(oid uint32, points []point,
	element func(point) (bits uint64, isNull bool)) []byte {
	wire := make([]byte, 0, arrayHeader+len(points)*(4+elementLength))
	length := uint32(len(points)) // #nosec G115 -- at most 100,000
	for _, field := range []uint32{1, 1, oid, length, 1} {
		wire = binary.BigEndian.AppendUint32(wire, field)
	}
	for _, p := range points {
		bits, isNull := element(p)
		if isNull {
			wire = binary.BigEndian.AppendUint32(wire, nullLength)
			continue
		}
		wire = binary.BigEndian.AppendUint32(wire, elementLength)
		wire = binary.BigEndian.AppendUint64(wire, bits)
	}
	return wire
}

func encodeTimes(points []point) []byte {
	return encodeArray(oidTimestamptz, points, func(p point) (uint64, bool) {
		return uint64(p.time - postgresEpoch), false // #nosec G115 -- the bits of a signed number
	})
}

// encodeEnds returns nil, which is NULL, if no point has an end.
func encodeEnds(points []point) []byte {
	if !slices.ContainsFunc(points, func(p point) bool { return p.end != 0 }) {
		return nil
	}
	return encodeArray(oidTimestamptz, points, func(p point) (uint64, bool) {
		return uint64(p.end - postgresEpoch), p.end == 0 // #nosec G115 -- as above
	})
}

func encodeValues(points []point) []byte {
	return encodeArray(oidFloat8, points, func(p point) (uint64, bool) {
		return math.Float64bits(p.value), math.IsNaN(p.value)
	})
}

// decodeTime is a timestamptz by its bits.
func decodeTime(bits uint64) timestamp {
	if bits == nullBits {
		return 0
	}
	return timestamp(bits) + postgresEpoch // #nosec G115 -- the bits of a signed number
}

var errBadArray = errors.New("array: expected elements of 8 bytes")

// decodeArray appends the elements of a one-dimensional array to dst, nullBits in place of NULL. A
// NULL array has none.
func decodeArray(dst []uint64, wire []byte) ([]uint64, error) {
	wire = wire[min(len(wire), arrayHeader):] // an empty array has a shorter header
	for len(wire) >= 4 {
		length := binary.BigEndian.Uint32(wire)
		wire = wire[4:]
		if length == nullLength {
			dst = append(dst, nullBits)
			continue
		}
		if length != elementLength || len(wire) < elementLength {
			return nil, errBadArray
		}
		dst = append(dst, binary.BigEndian.Uint64(wire))
		wire = wire[elementLength:]
	}
	if len(wire) > 0 {
		return nil, errBadArray
	}
	return dst, nil
}

// ---- Reads

// readQuery says which values to read.
type readQuery struct {
	series               []seriesRef // these, and those that match; without either: all
	match                []pattern   // of series_key
	places               []corrected // instead of series: the times of these alone
	start, end           timestamp   // start <= valid_time < end
	startKnown, endKnown timestamp   // likewise known_time
	asOf                 timestamp   // only versions written up to then
	changedSince         timestamp   // and after then
	runs                 []uuid      // only of these; none: of all
	workflows            []label     // likewise of runs of these
	lead                 span        // known_time is at least so long before valid_time; <0: ever
	daysAhead            dayCount    // known_time is not after timeOfDay so many days before; <0:
	timeOfDay            timeOfDay   // neither
	zone                 zone        // of timeOfDay, and of buckets
	bucket               width       // of the buckets to aggregate over; zero: none
	aggs                 aggregates
	overlapping          bool // every run, rather than the latest known
	allVersions          bool // every version, rather than the current
	latest               bool // of each series only the last value that is not NULL
}

var anyValue = readQuery{start: firstTime, end: lastTime, startKnown: firstTime, endKnown: lastTime,
	asOf: lastTime, changedSince: firstTime, lead: -1, daysAhead: -1, timeOfDay: -1,
	zone: zone{time.UTC}}

// version is what all elements of one row of values_table share.
type version struct {
	of                    *series   // the same pointer in all rows of a series that are read
	first                 timestamp // no valid_time of the row, in its window, is earlier
	RunID                 string
	Order                 int64 // of the run, among those inserted
	Number                int
	Known, Change         timestamp
	ChangedBy, Annotation *string
	Tags                  pq.StringArray
	weight                int64     // bytes that each element holds: itself and its part of this
	aggregates            []float64 // of a bucket, in place of the element's value
}

// supersedes decides which of two elements counts if they have the same series, valid_time and
// valid_time_end: the later known; of runs known at the same time the one inserted later; of one
// run the higher version.
func (v *version) supersedes(w *version) bool {
	return cmp.Or(
		cmp.Compare(v.Known, w.Known),
		cmp.Compare(v.Order, w.Order),
		cmp.Compare(v.Number, w.Number)) > 0
}

// Bytes that an element takes, and a copy of it while lists are merged; and that a version takes
// beside its texts.
const (
	elementBytes = 2 * 32
	versionBytes = 300
)

// versionCopies is how often a version that is corrected stands in memory at most: as it was, as it
// will be, and twice on its way to the database.
const versionCopies = 4

// bytes is how much memory v takes.
func (v *version) bytes() int64 {
	n := versionBytes
	if v.Annotation != nil {
		n += len(*v.Annotation)
	}
	for _, tag := range v.Tags {
		n += len(tag)
	}
	return int64(n)
}

// element is one value of one version; a NULL value is NaN. Whoever is given one may keep it only
// during the call.
type element struct {
	point
	from *version // of a bucket only its series and aggregates count
}

// merger combines sorted blocks that arrive in the order of their first valid_time into one sorted
// sequence. What a later block may still supersede or precede it holds in lists, each at least
// twice as long as the next one. So there are few lists, and n elements of k blocks cost n log k,
// however the blocks overlap.
type merger struct {
	everyRun bool // only versions of one run supersede each other
	keepAll  bool // keep every version, ordered by valid_time and version
	lists    [][]element
	bytes    int64 // that the lists take
}

// compare orders elements; 0 means that one supersedes the other.
func (m *merger) compare(a, b *element) int {
	order := comparePoints(a.point, b.point)
	if m.keepAll && a.time == b.time {
		order = cmp.Or(
			cmp.Compare(a.from.Number, b.from.Number),
			order,
			cmp.Compare(a.from.Known, b.from.Known))
	}
	if order == 0 && (m.keepAll || m.everyRun) {
		order = cmp.Compare(a.from.Order, b.from.Order)
	}
	return order
}

// add takes over a block, which is sorted and without repetition.
func (m *merger) add(block []element) {
	for i := range block {
		m.bytes += block[i].from.weight
	}
	m.lists = append(m.lists, block)
	for i := len(m.lists) - 2; i >= 0; i-- {
		if len(m.lists[i]) < 2*len(m.lists[i+1]) {
			m.lists[i] = m.merge(m.lists[i], m.lists[i+1])
			m.lists = slices.Delete(m.lists, i+1, i+2)
		}
	}
}

// merge returns a list of what a and b hold, in order.
func (m *merger) merge(a, b []element) []element {
	merged := make([]element, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		order := m.compare(&a[0], &b[0])
		switch {
		case order < 0:
			merged = append(merged, a[0])
			a = a[1:]
		case order > 0:
			merged = append(merged, b[0])
			b = b[1:]
		case a[0].from.supersedes(b[0].from):
			m.bytes -= b[0].from.weight
			b = b[1:]
		default:
			m.bytes -= a[0].from.weight
			a = a[1:]
		}
	}
	merged = append(merged, a...)
	return append(merged, b...)
}

// flush emits, in order, the elements before bound, which no later block can touch.
func (m *merger) flush(bound timestamp, emit func(*element) error) error {
	var ready []element
	for i, list := range slices.Backward(m.lists) { // short lists meet before they meet long ones
		n, _ := slices.BinarySearchFunc(list, bound, func(e element, t timestamp) int {
			return cmp.Compare(e.time, t)
		})
		m.lists[i] = list[n:]
		switch {
		case len(ready) == 0:
			ready = list[:n]
		case n > 0:
			ready = m.merge(ready, list[:n])
		}
	}
	m.lists = slices.DeleteFunc(m.lists, func(list []element) bool { return len(list) == 0 })
	for i := range ready {
		m.bytes -= ready[i].from.weight
		if err := emit(&ready[i]); err != nil {
			return err
		}
	}
	return nil
}

// What to read from are windows: of a series, from start up to end. A query of blocks, which
// statement puts together, is selectBlocks, what lists the windows in order, and the rows that
// overlap them: fromValues with conditions and an order, andBlocks with the same, and all in order.
// $1 is the tenant; $2 and $3 are the window; the others are those of ofQuery.
const (
	// tenantBlocks are the tenant's rows of values_table, those of one value with an array of one,
	// as in the view value_blocks. Either half has an index of its own.
	tenantBlocks = `(
			SELECT series_number, run_id, known_time, change_time, valid_from,
			       valid_from AS valid_to, ARRAY[value] AS "values"
			FROM values_table WHERE tenant_id = $1 AND valid_to IS NULL
			UNION ALL
			SELECT series_number, run_id, known_time, change_time, valid_from, valid_to, "values"
			FROM values_table WHERE tenant_id = $1 AND valid_to IS NOT NULL) AS v`

	// ofQuery is what a block v must fulfil whatever its time: bounds of known_time, as_of and
	// changed_since, and runs, of which NULL is any.
	ofQuery = `
				  AND v.known_time >= $4 AND v.known_time < $5
				  AND v.change_time <= $6 AND v.change_time > $7
				  AND ($8::uuid[] IS NULL OR v.run_id = ANY ($8))`

	// notWithdrawn is what its run must be, and notWithdrawnNow the same as of now. That is looked
	// up for each block: NOT EXISTS might read all withdrawals first.
	notWithdrawn    = withdrawalOf + ` AND d.change_time <= $6) IS NULL`
	notWithdrawnNow = withdrawalOf + `) IS NULL`
	withdrawalOf    = `(
			SELECT d.change_time FROM withdrawals_table d
			WHERE d.tenant_id = $1 AND d.run_id = v.run_id`

	// What it must fulfil as well. To look runs up costs a little even where nobody asks for it.
	anyWorkflow = ` AND $9::text[] IS NULL`
	ofWorkflows = ` AND (
			      SELECT r.workflow_id FROM runs_table r
			      WHERE r.tenant_id = $1 AND r.run_id = v.run_id AND r.inserted_at <= $6)
			      = ANY ($9)`

	// windowsOfAll has one window of each series of the tenant.
	windowsOfAll = `
		SELECT series_number, series_id, series_key, unit, '' AS wanted_id, '' AS wanted_key,
		       $2::timestamptz AS window_start, $3::timestamptz AS window_end
		FROM series_table WHERE tenant_id = $1 AND inserted_at <= $6
		ORDER BY series_key COLLATE "C"`

	// windowOfKey and windowOfID have the window of one series, by its key or id $4, if there is
	// one. They are for plain reads, which most are: what nobody asks for takes time too.
	windowOfKey = windowOfOne + `s.series_key = $4`
	windowOfID  = windowOfOne + `s.series_id = $4`
	windowOfOne = `
		SELECT s.series_number, s.series_id, s.series_key, s.unit,
		       '' AS wanted_id, '' AS wanted_key,
		       $2::timestamptz AS window_start, $3::timestamptz AS window_end
		FROM series_table s WHERE s.tenant_id = $1 AND `

	// windowsOfNamed has one window of each series that $10, JSON, names by id or key. What there
	// is not comes first, with the name and no series.
	windowsOfNamed = `
		SELECT DISTINCT ON (s.series_key COLLATE "C")
		       s.series_number, s.series_id, s.series_key, s.unit, ref.id AS wanted_id,
		       ref.key AS wanted_key,
		       $2::timestamptz AS window_start, $3::timestamptz AS window_end
		FROM json_to_recordset($10) AS ref (id text, key text, given text)
		LEFT JOIN LATERAL ` + seriesOfRef + ` ON s.inserted_at <= $6
		ORDER BY s.series_key COLLATE "C" NULLS FIRST`

	// windowsOfMatched has those of windowsOfNamed, and one of each series whose key is like one of
	// $11.
	windowsOfMatched = `
		SELECT DISTINCT ON (series_key COLLATE "C") *
		FROM (
			SELECT series_number, series_id, series_key, unit, '' AS wanted_id, '' AS wanted_key,
			       $2::timestamptz AS window_start, $3::timestamptz AS window_end
			FROM series_table
			WHERE tenant_id = $1 AND inserted_at <= $6 AND series_key LIKE ANY ($11::text[])
			UNION ALL (` + windowsOfNamed + `)
		) AS w
		ORDER BY series_key COLLATE "C" NULLS FIRST`

	// windowsOfPlaces covers the times that $10, JSON, lists by series_id: of each series one
	// window for each 32 days in which there are some. OFFSET 0 has each series looked up by its
	// id, whatever PostgreSQL believes about how many there are.
	windowsOfPlaces = `
		SELECT s.series_number, s.series_id, s.series_key, s.unit, '' AS wanted_id,
		       '' AS wanted_key, p.window_start, p.window_end
		FROM (
			SELECT series_id, min(valid_time) AS window_start,
			       max(valid_time) + interval '1 microsecond' AS window_end
			FROM json_to_recordset($10) AS place (series_id uuid, valid_time timestamptz)
			WHERE valid_time >= $2 AND valid_time < $3
			GROUP BY series_id, date_bin('768 hours', valid_time, 'epoch')
		) AS p
		CROSS JOIN LATERAL (
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_id = p.series_id OFFSET 0
		) AS s
		ORDER BY s.series_key COLLATE "C", p.window_start`

	// latestStart to latestClose stand around windows of which only the last value that is not NULL
	// is asked for, with the conditions after the first three. They let a window begin at one of
	// its last ten blocks, if all that there is of that block's first time comes without NULL: so
	// that time has a value. OFFSET 0 has blocks looked up by their time, and keeps PostgreSQL from
	// doing all this again for each block read.
	latestStart = `
		SELECT w.series_number, w.series_id, w.series_key, w.unit, w.wanted_id, w.wanted_key,
		       coalesce((
			SELECT last.valid_from
			FROM (
				SELECT DISTINCT valid_from
				FROM (` + startsInWindow + ` AND v.valid_to IS NULL`
	latestUnion = ` ORDER BY valid_from DESC)
				UNION ALL ` + startsInWindow + ` AND v.valid_to IS NOT NULL`
	startsInWindow = `(
					SELECT valid_from FROM values_table v
					WHERE v.tenant_id = $1 AND v.series_number = w.series_number
					  AND v.valid_from >= w.window_start AND v.valid_from < w.window_end
					  AND ` + notWithdrawn
	latestCheck = ` ORDER BY valid_from DESC)) AS v
				ORDER BY valid_from DESC LIMIT 10
			) AS last
			WHERE NOT EXISTS (
				SELECT FROM ` + tenantBlocks + `
				WHERE v.series_number = w.series_number
				  AND v.valid_from >= last.valid_from - interval '768 hours'
				  AND v.valid_from <= last.valid_from AND v.valid_to >= last.valid_from
				  AND num_nulls(VARIADIC v."values") > 0
				  AND ` + notWithdrawn
	latestEnd = `
				OFFSET 0)
			ORDER BY last.valid_from DESC LIMIT 1), w.window_start) AS window_start, w.window_end
		FROM (`
	latestClose = `) AS w OFFSET 0`

	// Of each window the blocks that overlap it, and of each block what lies in it: lo to hi.
	// width_bucket is a binary search, and times are valid_times unpacked once for all that looks
	// into them: the order keeps PostgreSQL from unpacking them for each. Rows of one value and
	// blocks come from an index each, in order, and are merged. A block spans 768 hours at most, so
	// both bounds on valid_from make a range of its index.
	selectBlocks = `
	SELECT w.wanted_id, w.wanted_key, coalesce(w.series_id::text, ''), coalesce(w.series_key, ''),
	       coalesce(w.unit, ''), coalesce(b.run_id::text, ''), coalesce(b.run_order, 0),
	       coalesce(b.version, 0), b.changed_by, b.annotation, b.tags,
	       array_send(ARRAY[b.known_time, b.change_time, greatest(b.valid_from, w.window_start)]),
	       array_send(b.times[b.lo:b.hi]), array_send(b.valid_time_ends[b.lo:b.hi]),
	       array_send(b.numbers[b.lo:b.hi])
	FROM (`
	fromValues = `) AS w
	LEFT JOIN LATERAL (
		SELECT *, width_bucket(w.window_start - interval '1 microsecond', times) + 1 AS lo,
		       width_bucket(w.window_end - interval '1 microsecond', times) AS hi
		FROM ((
			SELECT ARRAY[valid_from] AS times, ARRAY[value] AS numbers` + ofWindow + `
				  AND v.valid_to IS NULL AND v.valid_from >= w.window_start`
	andBlocks = `) UNION ALL (
			SELECT valid_times || '{}' AS times, "values" AS numbers` + ofWindow + `
				  AND v.valid_to >= w.window_start
				  AND v.valid_from >= w.window_start - interval '768 hours'`
	ofWindow = `, valid_time_ends, run_id, run_order, version,
				       changed_by, annotation, tags, known_time, change_time, valid_from
				FROM values_table v
				WHERE v.tenant_id = $1 AND v.series_number = w.series_number
				  AND v.valid_from < w.window_end`
	endRows   = `)`
	byTime    = ` ORDER BY valid_from`
	byKnown   = ` ORDER BY known_time, valid_from`
	shown     = `) AS v WHERE ` + notWithdrawn + endBlocks + orUnknown
	shownNow  = `) AS v WHERE ` + notWithdrawnNow + endBlocks
	endBlocks = ` OFFSET 0) AS b ON true`

	// orUnknown leaves out a window without blocks, unless it has no series.
	orUnknown = ` WHERE b.version IS NOT NULL OR w.series_id IS NULL`
)

// isPlain tells whether q asks for one series, by its id or by a key that was given as it is kept,
// and for nothing else that a block must fulfil.
func (q *readQuery) isPlain() bool {
	filters := len(q.match) + len(q.places) + len(q.runs) + len(q.workflows)
	if len(q.series) != 1 || filters > 0 || q.latest {
		return false
	}
	ref := q.series[0]
	isNamedOnce := ref.Given == "" && (ref.ID == "" || ref.Key == "")
	return isNamedOnce && q.startKnown == firstTime && q.endKnown == lastTime &&
		q.asOf == lastTime && q.changedSince == firstTime
}

// statement is the SQL that reads the blocks which q is about. It consists of constants alone.
func (q *readQuery) statement() string {
	order := byTime
	if q.overlapping {
		order = byKnown
	}
	if q.isPlain() {
		window := windowOfKey
		if q.series[0].ID != "" {
			window = windowOfID
		}
		return selectBlocks + window + fromValues + order + andBlocks + order + endRows + order +
			shownNow
	}
	windows := windowsOfAll
	switch {
	case len(q.places) > 0:
		windows = windowsOfPlaces
	case len(q.match) > 0:
		windows = windowsOfMatched
	case len(q.series) > 0:
		windows = windowsOfNamed
	}
	conditions := ofQuery + anyWorkflow
	if len(q.workflows) > 0 {
		conditions = ofQuery + ofWorkflows
	}
	if q.latest && q.lead < 0 && q.daysAhead < 0 { // SQL knows nothing of these
		windows = latestStart + conditions + latestUnion + conditions + latestCheck + conditions +
			latestEnd + windows + latestClose
	}
	rows := conditions + order
	return selectBlocks + windows + fromValues + rows + andBlocks + rows + endRows + order + shown
}

// args are the arguments of statement.
func (q *readQuery) args(c Caller) []any {
	if q.isPlain() {
		name := cmp.Or(string(q.series[0].Key), string(q.series[0].ID))
		return []any{c.tenant, q.start, q.end, name}
	}
	args := []any{
		c.tenant,
		q.start, q.end,
		q.startKnown, q.endKnown,
		q.asOf, q.changedSince,
		pq.Array(q.runs), pq.Array(q.workflows),
	}
	switch {
	case len(q.places) > 0:
		args = append(args, asJSON(q.places))
	case len(q.series)+len(q.match) > 0:
		args = append(args, asJSON(append([]seriesRef{}, q.series...))) // nil would be null
	}
	if len(q.match) > 0 {
		args = append(args, pq.Array(q.match))
	}
	return args
}

// Read calls emit for each value that q asks for, ordered by series_key, then valid_time
// (overlapping: known_time, valid_time), then version. Memory holds what overlaps, for which the
// request's claim grows, and not the result. An unknown series is notFound. An error of emit ends
// the read.
func (s *store) Read(ctx context.Context, c Caller, q readQuery, memory *claim,
	emit func(*element) error) error {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return err
	}
	defer leave()
	if err := s.checkRuns(ctx, c, q); err != nil {
		return err
	}
	read := blockReader{
		merger:  merger{everyRun: q.overlapping, keepAll: q.allVersions},
		byKnown: q.overlapping,
		lead:    q.lead,
		memory:  memory,
		emit:    emit,
	}
	if q.daysAhead >= 0 {
		read.gate = &gate{daysAhead: q.daysAhead, timeOfDay: q.timeOfDay, zone: q.zone}
	}
	finish := func() error { return nil }
	switch {
	case q.bucket != width{}:
		b := buckets{width: q.bucket, zone: q.zone, aggs: q.aggs, emit: emit}
		read.emit = b.add
		finish = b.finish
	case q.latest:
		l := latest{emit: emit}
		read.emit = l.add
		finish = l.finish
	}
	err = s.readBlocks(ctx, c, nil, q, &read)
	switch {
	case read.unknown != seriesRef{} && q.asOf == lastTime:
		return s.suggestSeries(ctx, c, nil, read.unknown)
	case read.unknown.Key != "": // perhaps there is one now
		return refuse(notFound, "series_key: as of then there was no series %q", read.unknown.Key)
	case err != nil:
		return err
	}
	return finish()
}

// checkRuns refuses a run_id of which the caller's tenant had no run as of the moment.
func (s *store) checkRuns(ctx context.Context, c Caller, q readQuery) error {
	if len(q.runs) == 0 {
		return nil
	}
	return s.eachRow(ctx, nil, `
		SELECT wanted FROM unnest($2::uuid[]) AS wanted
		WHERE (SELECT run_id FROM runs_table
		       WHERE tenant_id = $1 AND run_id = wanted AND inserted_at <= $3) IS NULL`,
		[]any{c.tenant, pq.Array(q.runs), q.asOf}, func(rows *sql.Rows) error {
			var id string
			if err := rows.Scan(&id); err != nil {
				return err
			}
			return refuse(notFound, "run_id: there is no run %q", id)
		})
}

// readBlocks has the blocks read which q is about, in tx unless that is nil. It refuses the unknown
// series of a plain read.
func (s *store) readBlocks(ctx context.Context, c Caller, tx *sql.Tx, q readQuery,
	read *blockReader) error {
	read.last = &version{of: &series{}}
	read.heldBefore = read.memory.held
	err := s.eachRow(ctx, tx, q.statement(), q.args(c), func(rows *sql.Rows) error {
		return read.next(ctx, rows)
	})
	if err != nil {
		return err
	}
	if q.isPlain() && read.last.of.ID == "" {
		return s.suggestSeries(ctx, c, tx, q.series[0])
	}
	return read.flush(lastTime, read.emit)
}

// maxMerge is how much memory the merge of one read may take, in bytes: a million versions of the
// same time, or of times that one run covers.
const maxMerge = 64 << 20

// blockReader decodes rows of a query of blocks, and merges them. Its buffers serve one row after
// the other.
type blockReader struct {
	merger
	byKnown    bool   // of a series rows come by known_time, and are merged within it
	lead       span   // as in readQuery
	gate       *gate  // nil: none
	memory     *claim // of the request, which held so much before
	heldBefore int64
	emit       func(*element) error // gets each element, in order
	last       *version             // of the row before
	unknown    seriesRef            // there is no such series, which ended the read

	stamps, times, ends, values arrayBuffer
}

// arrayBuffer is an array as it comes, and the bits of its elements.
type arrayBuffer struct {
	wire sql.RawBytes
	bits []uint64
}

// next takes the row at hand.
func (b *blockReader) next(ctx context.Context, rows *sql.Rows) error {
	v, block, err := b.decode(rows)
	if err != nil {
		return err
	}
	if *v.of == *b.last.of {
		v.of = b.last.of
	}
	bound := lastTime // another series, or known_time, begins
	if v.of == b.last.of && (v.Known == b.last.Known || !b.byKnown) {
		bound = v.first
	}
	if v.of.Key < b.last.of.Key || bound < b.last.first {
		return errors.New("the database sent blocks out of order")
	}
	b.last = v
	if err := b.flush(bound, b.emit); err != nil {
		return err
	}
	b.add(block)
	if b.bytes > maxMerge {
		return invalid("too many versions of the same time to merge: ask for less at once, such " +
			"as fewer runs")
	}
	return b.memory.reach(ctx, b.heldBefore+b.bytes)
}

// decode decodes the row at hand into a version and its elements, without those that were not known
// lead before their time.
func (b *blockReader) decode(rows *sql.Rows) (*version, []element, error) {
	v := &version{of: &series{}}
	var wanted seriesRef
	err := rows.Scan(
		&wanted.ID, &wanted.Key,
		&v.of.ID, &v.of.Key, &v.of.Unit,
		&v.RunID, &v.Order, &v.Number,
		&v.ChangedBy, &v.Annotation, &v.Tags,
		&b.stamps.wire, &b.times.wire,
		&b.ends.wire, &b.values.wire)
	if err != nil {
		return nil, nil, err
	}
	if v.of.ID == "" {
		b.unknown = wanted
		return nil, nil, noSeries(wanted)
	}
	for _, array := range []*arrayBuffer{&b.stamps, &b.times, &b.ends, &b.values} {
		array.bits, err = decodeArray(array.bits[:0], array.wire)
		if err != nil {
			return nil, nil, err
		}
	}
	v.Known = decodeTime(b.stamps.bits[0])
	v.Change = decodeTime(b.stamps.bits[1])
	v.first = decodeTime(b.stamps.bits[2])
	block := make([]element, 0, len(b.times.bits))
	for i, bits := range b.times.bits { // the table checks that the arrays have one length
		p := point{time: decodeTime(bits), value: math.Float64frombits(b.values.bits[i])}
		if b.lead >= 0 && p.time-v.Known < timestamp(b.lead) {
			continue
		}
		if b.gate != nil && v.Known > b.gate.closes(p.time) {
			continue
		}
		if len(b.ends.bits) > 0 {
			p.end = decodeTime(b.ends.bits[i])
		}
		block = append(block, element{p, v})
	}
	v.weight = elementBytes + v.bytes()/int64(max(1, len(block)))
	return v, block, nil
}

// latest passes on, of each series, the last element that is not NULL.
type latest struct {
	emit func(*element) error
	last element // of the series at hand; before the first it is from nil
}

func (l *latest) add(e *element) error {
	if math.IsNaN(e.value) {
		return nil
	}
	if l.last.from != nil && l.last.from.of != e.from.of {
		if err := l.finish(); err != nil {
			return err
		}
	}
	l.last = *e
	return nil
}

func (l *latest) finish() error {
	if l.last.from == nil {
		return nil
	}
	return l.emit(&l.last)
}

// aggregates are ways to make one value of those in a bucket, in the order asked for.
type aggregates []string

func (aggregates) expected() string { return "mean, min, max, sum, count, first or last" }

// UnmarshalText adds one more.
func (a *aggregates) UnmarshalText(text []byte) error {
	name := string(text)
	if slices.Contains(*a, name) {
		return invalid("agg: %s given twice", name)
	}
	switch name {
	case "mean", "min", "max", "sum", "count", "first", "last":
		*a = append(*a, name)
		return nil
	}
	return unfit[aggregates](text)
}

// firstInstant is the first moment at which the zone's calendar and clocks show this time or a
// later one. So of a time that clocks repeat it is the first, and of one that they skip the jump.
func (z zone) firstInstant(year, month, date int, clock timeOfDay) timestamp {
	local := time.Date(year, time.Month(month), date, 0, 0, 0, 0, time.UTC) // as if it were UTC
	local = local.Add(time.Duration(clock) * time.Microsecond)
	t := local.AddDate(0, 0, -1).In(z.Location) // no clock is a day ahead of UTC
	for {
		_, offset := t.Zone()
		_, change := t.ZoneBounds()
		if !change.After(t) { // no change to come, or Go errs: it ends each year after 365 days
			change = t.AddDate(0, 0, 1)
		}
		shown := local.Add(-time.Duration(offset) * time.Second)
		if shown.Before(t) {
			return timestampOf(t)
		}
		if shown.Before(change) {
			return timestampOf(shown)
		}
		t = change
	}
}

const averageMonth = timestamp(day) * 146_097 / 4800 // 400 years have so many days

// around returns the bounds of the bucket that t lies in. One of the calendar begins at the first
// moment that has its first local date, or a later one. Clocks that go back over midnight do not
// begin the day before anew.
func (w width) around(t timestamp, z zone) (begin, end timestamp) {
	if w.exact > 0 {
		length := timestamp(w.exact)
		begin = t - (t-unixEpoch%length)%length
		return begin, begin + length
	}
	// A guess that is not beyond: zones are less than a day, and months in all less than a week,
	// from what an average makes of them.
	length := timestamp(day)*timestamp(w.days) + averageMonth*timestamp(w.months)
	n := int((t-unixEpoch)/length) - 2
	for end <= t {
		begin = end
		end = z.firstInstant(1970, 1+n*w.months, w.first+n*w.days, 0)
		n++
	}
	return begin, end
}

// gate tells by when a run must be known to count for a valid_time: by a time of day so many days
// before. It is the same for all of a local day.
type gate struct {
	daysAhead  dayCount
	timeOfDay  timeOfDay
	zone       zone
	begin, end timestamp // of the day
	closing    timestamp
}

func (g *gate) closes(t timestamp) timestamp {
	if t < g.begin || t >= g.end {
		g.begin, g.end = width{days: 1, first: 1}.around(t, g.zone)
		year, month, date := g.begin.utc().In(g.zone.Location).Date()
		g.closing = g.zone.firstInstant(year, int(month), date-int(g.daysAhead), g.timeOfDay)
	}
	return g.closing
}

// buckets aggregates elements that come in order, NULLs aside.
type buckets struct {
	width width
	zone  zone
	aggs  aggregates
	emit  func(*element) error

	// Of the bucket that is being filled:
	begin, end                     timestamp
	from                           version
	n, sum, low, high, first, last float64
}

// add takes one more element. The first beyond a bucket ends it.
func (b *buckets) add(e *element) error {
	if math.IsNaN(e.value) {
		return nil
	}
	if e.time < b.begin || e.time >= b.end || e.from.of != b.from.of {
		if err := b.finish(); err != nil {
			return err
		}
		b.begin, b.end = b.width.around(e.time, b.zone)
		b.from.of = e.from.of
		b.n = 0
		b.sum = 0
		b.low = e.value
		b.high = e.value
		b.first = e.value
	}
	b.n++
	b.sum += e.value
	b.low = min(b.low, e.value)
	b.high = max(b.high, e.value)
	b.last = e.value
	return nil
}

// finish emits the bucket that is being filled, if there is one. A sum that no float64 can hold is
// invalid: JSON has no infinity.
func (b *buckets) finish() error {
	if b.n == 0 {
		return nil
	}
	b.from.aggregates = b.from.aggregates[:0]
	for _, agg := range b.aggs {
		value := b.value(agg)
		if math.IsInf(value, 0) {
			return invalid("agg: the %s of series %q from %s on is beyond a 64-bit float",
				agg, b.from.of.Key, b.begin)
		}
		b.from.aggregates = append(b.from.aggregates, value)
	}
	return b.emit(&element{point{time: b.begin}, &b.from})
}

func (b *buckets) value(agg string) float64 {
	switch agg {
	case "min":
		return b.low
	case "max":
		return b.high
	case "sum":
		return b.sum
	case "count":
		return b.n
	case "first":
		return b.first
	case "last":
		return b.last
	}
	return b.sum / b.n
}

// ---- Corrections

// runName names a run by its id, by its known_time, or by both.
type runName struct {
	id    uuid
	known timestamp
}

// names tells whether the run of v may be meant.
func (n runName) names(v *version) bool {
	return (n.id == "" || string(n.id) == v.RunID) &&
		(n.known == 0 || n.known == v.Known)
}

// correction is one update of a value. What is not given stays as it is, and null clears it.
type correction struct {
	ref        seriesRef
	of         runName // whose value is corrected; none: of whichever run a flat read shows
	point      point   // its time and end; the value is given below
	value      optional[number]
	annotation optional[prose]
	tags       optional[[]label]
}

// target is what is corrected: the value that one run has at a time of a series.
type target struct {
	Series string    `json:"series_id"`
	Run    string    `json:"run_id"` // "": of any
	Time   timestamp `json:"valid_time"`
	end    timestamp
}

// corrected is a value as it stands after a correction, or as it stood before.
type corrected struct {
	target
	ref     seriesRef // by which it is read
	Tenant  string    `json:"tenant_id"`
	Version int       `json:"version"`
	ValueID int64     `json:"value_id,omitempty"` // if it was stored

	value, old float64 // old is of the version before; NULL if there was none
	annotation *string
	tags       pq.StringArray
	changed    bool
}

// Correct stores a new version for each correction that changes something, all or none; of several
// for one value the last counts. It returns what was stored, and what was not because nothing
// changed.
func (s *store) Correct(ctx context.Context, c Caller, corrections []correction, memory *claim) (
	updated, unchanged []corrected, err error) {
	updated = []corrected{} // not nil, which JSON shows as null
	unchanged = []corrected{}
	if len(corrections) == 0 {
		return updated, unchanged, nil
	}
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		stored, keys, err := s.findTargets(ctx, c, tx, corrections)
		if err != nil {
			return err
		}
		now, valueIDs, err := s.lockSeries(ctx, c, tx, keys)
		if err != nil {
			return err
		}
		intervals, err := s.findStored(ctx, c, tx, corrections, stored, memory)
		if err != nil {
			return err
		}
		if err := s.gainValues(ctx, c, tx, corrections, stored, intervals); err != nil {
			return err
		}
		last := map[target]int{} // the last correction of each
		for i := range corrections {
			corrections[i].apply(&stored[i])
			last[stored[i].target] = i
		}
		for i, v := range stored {
			switch {
			case last[v.target] != i:
			case v.changed:
				v.ValueID = valueIDs[i]
				updated = append(updated, v)
			default:
				unchanged = append(unchanged, v)
			}
		}
		for some := range slices.Chunk(updated, versionsPerStatement) {
			if err := s.insertCorrected(ctx, c, tx, some, now); err != nil {
				return err
			}
		}
		return nil
	})
	if sqlState(err) == uniqueViolation { // corrections_by_version: another got the number
		err = refuse(busy, "The value was corrected by another request just now.")
	}
	return updated, unchanged, err
}

// maxSeriesLocks bounds how much of PostgreSQL's table of locks, by default 6,400, one request
// takes: at all places of a server together a third of it.
const maxSeriesLocks = 100

// lockSeries has corrections of the same series wait for each other, so that each sees the one
// before, and for withdrawals. Keys are those of the series, one for each correction. What is about
// many series has all of the tenant's wait. Around a change of the key, which is rare, the index
// corrections_by_version refuses what waits for nobody. Advisory locks need no UPDATE privilege.
// It returns a stamp of a moment after the wait.
//
// Clients choose keys, and could choose one for its hash. So a series' lock is of another kind than
// a tenant's, and has a hash of the tenant beside that of the key. Two tenants with one hash would
// wait for each other; but no client chooses its tenant.
func (s *store) lockSeries(ctx context.Context, c Caller, tx *sql.Tx, keys []string) (
	now timestamp, valueIDs pq.Int64Array, err error) {
	slices.Sort(keys) // in one order, whoever locks, so that nobody waits for each other
	if len(slices.Compact(slices.Clone(keys))) > maxSeriesLocks {
		if err := s.lockTenant(ctx, c, tx); err != nil {
			return 0, nil, err
		}
		return s.stamp(ctx, tx, len(keys))
	}
	// OFFSET 0 has the locks taken before the clock is read.
	err = s.eachRow(ctx, tx, `
		SELECT clock_timestamp(), nextval('values_table_value_id_seq')
		FROM (SELECT pg_advisory_xact_lock_shared(hashtextextended($1, 0)),
		             pg_advisory_xact_lock(hashtext($1), hashtext(key))
		      FROM unnest($2::text[]) AS key OFFSET 0) AS locked`,
		[]any{c.tenant, pq.Array(keys)}, func(rows *sql.Rows) error {
			var moment time.Time
			var id int64
			err := rows.Scan(&moment, &id)
			now = timestampOf(moment)
			valueIDs = append(valueIDs, id)
			return err
		})
	return now, valueIDs, err
}

// lockTenant waits for the corrections and withdrawals of a tenant, and has others wait.
func (s *store) lockTenant(ctx context.Context, c Caller, tx *sql.Tx) error {
	_, err := s.change(ctx, tx, `SELECT pg_advisory_xact_lock(hashtextextended($1, 0))`, c.tenant)
	return err
}

// findTargets returns what each correction is about, as yet without a run, and its series' key. If
// all name one series by its key, as most do, it has no id yet: a plain read finds it.
func (s *store) findTargets(ctx context.Context, c Caller, tx *sql.Tx, corrections []correction) (
	stored []corrected, keys []string, err error) {
	refs := []seriesRef{}
	for _, x := range corrections {
		t := target{Time: x.point.time, end: x.point.end}
		v := corrected{target: t, ref: x.ref, Tenant: c.tenant, value: math.NaN()}
		stored = append(stored, v)
		refs = append(refs, x.ref)
		keys = append(keys, string(x.ref.Key))
	}
	if q := readOf(stored); q.isPlain() && refs[0].ID == "" {
		return stored, keys, nil
	}
	named, err := s.findSeries(ctx, c, tx, refs)
	if err != nil {
		return nil, nil, err
	}
	for i, x := range named {
		stored[i].Series = x.ID
		stored[i].ref = seriesRef{ID: uuid(x.ID)}
		keys[i] = x.Key
	}
	return stored, keys, nil
}

// findStored completes stored, what each correction is about, by the rule and the query of any
// read. Where nothing is stored, there is no run. It returns where a correction without an end
// meets a run's interval that begins at its time.
func (s *store) findStored(ctx context.Context, c Caller, tx *sql.Tx, corrections []correction,
	stored []corrected, memory *claim) (intervals map[target]bool, err error) {
	intervals = map[target]bool{}
	from := make([]*version, len(corrections))
	kept := int64(0) // bytes of these
	namesRun := slices.ContainsFunc(corrections, func(x correction) bool {
		return x.of != runName{}
	})
	read := blockReader{merger: merger{everyRun: namesRun}, lead: -1, memory: memory}
	// wanted says which corrections are about it. The read has told by then which series it is.
	wanted := sync.OnceValue(func() map[target][]int {
		byTarget := map[target][]int{}
		for i := range stored {
			v := &stored[i]
			v.Series = cmp.Or(v.Series, read.last.of.ID)
			byTarget[v.target] = append(byTarget[v.target], i)
		}
		return byTarget
	})
	read.emit = func(e *element) error {
		begins := target{Series: e.from.of.ID, Time: e.time}
		if e.end != 0 && namesRun && wanted()[begins] != nil {
			begins.Run = e.from.RunID
			intervals[begins] = true
			kept += elementBytes // of which versionCopies are what the map takes
		}
		here := target{Series: e.from.of.ID, Time: e.time, end: e.end}
		for _, i := range wanted()[here] {
			if !corrections[i].of.names(e.from) || from[i] != nil && from[i].supersedes(e.from) {
				continue
			}
			if from[i] != nil {
				kept -= from[i].bytes()
			}
			kept += e.from.bytes()
			from[i] = e.from
			stored[i].value = e.value
		}
		return memory.reach(ctx, read.heldBefore+read.bytes+kept*versionCopies)
	}
	err = s.readBlocks(ctx, c, tx, readOf(stored), &read)
	wanted() // perhaps nothing is stored there
	for i, v := range from {
		if v != nil {
			stored[i].Run = v.RunID
			stored[i].Version = v.Number
			stored[i].annotation = v.Annotation
			stored[i].tags = v.Tags
		}
	}
	return intervals, err
}

// readOf asks for what there is at the times of what is corrected. Of one series within 32 days
// that is a plain read of a window.
func readOf(stored []corrected) readQuery {
	q := anyValue
	q.start = lastTime
	q.end = firstTime
	q.series = []seriesRef{stored[0].ref}
	for _, v := range stored {
		q.start = min(q.start, v.Time)
		q.end = max(q.end, v.Time+1)
		if v.ref != stored[0].ref || q.end-q.start > maxBlockSpan {
			q = anyValue
			q.places = stored
			return q
		}
	}
	return q
}

// gainValues finds a run for each value that is not stored yet, and so gains it by its correction.
func (s *store) gainValues(ctx context.Context, c Caller, tx *sql.Tx, corrections []correction,
	stored []corrected, intervals map[target]bool) error {
	runs := map[runName]string{}
	for i, x := range corrections {
		v := &stored[i]
		if v.Run != "" {
			continue
		}
		var err error
		if runs[x.of] == "" {
			runs[x.of], err = s.gainingRun(ctx, c, tx, x.of)
		}
		if err == nil && !x.value.given {
			err = invalid("value is required, because the run has none at this valid_time")
		}
		v.Run = runs[x.of]
		if err == nil && intervals[v.target] {
			err = invalid("valid_time_end is required, because the run has an interval that " +
				"begins at this valid_time")
		}
		if err != nil {
			return prefix(fmt.Sprintf("updates[%d]: ", i), err)
		}
	}
	return nil
}

// gainingRun is the run that gains a value by a correction: of those named that are not withdrawn
// the latest inserted.
func (s *store) gainingRun(ctx context.Context, c Caller, tx *sql.Tx, name runName) (
	run string, err error) {
	if name == (runName{}) {
		return "", refuse(notFound, "the series has no value at this valid_time and "+
			"valid_time_end: to give one to a run, name the run by run_id or known_time")
	}
	withdrawn := false
	err = s.eachRow(ctx, tx, `
		SELECT run_id, withdrawn FROM (
			SELECT run_id, (SELECT change_time FROM withdrawals_table d WHERE d.tenant_id = $1
			                AND d.run_id = r.run_id) IS NOT NULL AS withdrawn
			FROM runs_table r
			WHERE tenant_id = $1 AND run_id = nullif($2, '')::uuid
			  AND known_time = coalesce($3::timestamptz, known_time)
			UNION ALL (
			SELECT run_id, false FROM runs_table r
			WHERE tenant_id = $1 AND known_time = $3::timestamptz AND $2 = ''
			  AND (SELECT change_time FROM withdrawals_table d WHERE d.tenant_id = $1
			       AND d.run_id = r.run_id) IS NULL
			ORDER BY run_order DESC LIMIT 1)
			UNION ALL (  -- if it is the only one, all are withdrawn
			SELECT run_id, true FROM runs_table r
			WHERE tenant_id = $1 AND known_time = $3::timestamptz AND $2 = '' LIMIT 1)
		) AS named ORDER BY withdrawn LIMIT 1`,
		[]any{c.tenant, name.id, name.known}, func(rows *sql.Rows) error {
			return rows.Scan(&run, &withdrawn)
		})
	switch {
	case err != nil:
		return "", err
	case run == "":
		return "", refuse(notFound, "no run has this run_id or known_time")
	case withdrawn:
		return "", refuse(conflict, "the run is withdrawn, and takes no corrections")
	}
	return run, nil
}

// apply makes v what it is after the correction. It changes if it was not stored, or if its value,
// annotation or tags do: the value by its bits, because 0.0 and -0.0 are different numbers here.
func (x *correction) apply(v *corrected) {
	before := *v
	v.old = before.value
	if x.value.given {
		v.value = math.NaN()
		if x.value.value != nil {
			v.value = float64(*x.value.value)
		}
	}
	if x.annotation.given {
		v.annotation = nil
		if text := x.annotation.value; text != nil && *text != "" {
			v.annotation = (*string)(text)
		}
	}
	if x.tags.given {
		v.tags = nil
		if x.tags.value != nil {
			v.tags = sortedTags(*x.tags.value)
		}
	}
	v.changed = v.Version == 0 ||
		math.Float64bits(v.value) != math.Float64bits(before.value) ||
		asJSON(v.annotation) != asJSON(before.annotation) || !slices.Equal(v.tags, before.tags)
	if v.changed {
		v.Version = max(v.Version, 1) + 1 // version 1 is always the upload's
	}
}

// sortedTags returns tags in the form in which they are stored: each once, in lower case, in order.
func sortedTags(tags []label) pq.StringArray {
	var sorted pq.StringArray
	for _, tag := range tags {
		sorted = append(sorted, tag.asTag())
	}
	slices.Sort(sorted)
	return slices.Compact(sorted)
}

// versionsPerStatement keeps the parameters of one INSERT within some tens of megabytes: a version
// may have 50 KB of tags, and as JSON, as an array and on its way several times that.
const versionsPerStatement = 100

// insertCorrected stores versions in one statement, as written now. If a run or a series
// is gone, nothing is stored.
func (s *store) insertCorrected(ctx context.Context, c Caller, tx *sql.Tx, versions []corrected,
	now timestamp) error {
	var series, runs, tags []string
	var numbers, valueIDs pq.Int64Array
	var points, before []point
	var annotations []*string
	for _, v := range versions {
		series = append(series, v.Series)
		runs = append(runs, v.Run)
		numbers = append(numbers, int64(v.Version))
		valueIDs = append(valueIDs, v.ValueID)
		points = append(points, point{v.Time, v.end, v.value})
		before = append(before, point{value: v.old})
		annotations = append(annotations, v.annotation)
		tags = append(tags, asJSON(v.tags))
	}
	stored, err := s.change(ctx, tx, `
		INSERT INTO values_table (tenant_id, series_number, run_id, value_id, run_order, version,
		       known_time, change_time, changed_by, annotation, tags, valid_from,
		       valid_time_ends, value, old_value) OVERRIDING SYSTEM VALUE
		SELECT r.tenant_id, s.series_number, r.run_id, n.value_id, r.run_order, n.version,
		       r.known_time, $3::timestamptz, nullif($2, ''), n.annotation,
		       CASE WHEN json_typeof(n.tags) = 'array'
		            THEN ARRAY(SELECT json_array_elements_text(n.tags)) END,
		       n.valid_time, nullif(ARRAY[n.valid_time_end], '{NULL}'), n.value, n.old_value
		FROM unnest($4::uuid[], $5::uuid[], $6::integer[], $7::bigint[], $8::timestamptz[],
		            $9::timestamptz[], $10::float8[], $11::float8[], $12::text[], $13::json[])
		AS n (series_id, run_id, version, value_id, valid_time,
		      valid_time_end, value, old_value, annotation, tags)
		CROSS JOIN LATERAL (
			SELECT * FROM runs_table WHERE tenant_id = $1 AND run_id = n.run_id OFFSET 0) AS r
		CROSS JOIN LATERAL (
			SELECT series_number FROM series_table
			WHERE tenant_id = $1 AND series_id = n.series_id OFFSET 0) AS s`,
		c.tenant, c.email, now,
		pq.Array(series), pq.Array(runs),
		numbers, valueIDs,
		encodeTimes(points), encodeEnds(points),
		encodeValues(points), encodeValues(before),
		pq.Array(annotations), pq.Array(tags))
	if err == nil && stored < int64(len(versions)) {
		return errErased
	}
	return err
}

// ---- Erasure: by an operator's command alone, of the tables' owner

// erasure is what a command erases of a tenant, and stands like this in the audit trail.
type erasure struct {
	Runs        runIDs     `json:"run_id,omitempty"`
	KnownBefore timestamp  `json:"known_before,omitempty"` // runs known before
	Series      seriesKeys `json:"series_key,omitempty"`
	Everything  bool       `json:"everything,omitempty"`

	action string
	users  bool // there is a users_table, with users of the tenant to erase
}

// runIDs are those of a flag that may be repeated.
type runIDs []string

func (ids *runIDs) UnmarshalText(text []byte) error {
	var id uuid
	err := id.UnmarshalText(text)
	*ids = append(*ids, string(id))
	return err
}

// seriesKeys are those of a flag that may be repeated, as they are stored, whatever a key must be
// like now.
type seriesKeys []string

func (keys *seriesKeys) UnmarshalText(text []byte) error {
	*keys = append(*keys, string(text))
	return nil
}

// loss is what an erasure takes.
type loss struct{ runs, values, series int64 }

func (l loss) String() string {
	return fmt.Sprintf("%d run(s), %d value(s), %d series", l.runs, l.values, l.series)
}

// What is erased of the tenant $1 is the runs $2, those known before $3, and the series $4, with
// their values; or, if $5 is true, everything. Both statements return the first name that there is
// not, and how much there is. A run's values lie apart, so all rows of the tenant are looked at,
// by way of its series.
const (
	chosen = `
		WITH chosen_runs AS (
			SELECT run_id FROM runs_table
			WHERE tenant_id = $1 AND ($5 OR known_time < coalesce($3::timestamptz, '-infinity')
			                          OR run_id IN (SELECT unnest($2::uuid[])))
		), chosen_series AS (
			SELECT series_number, series_key FROM series_table
			WHERE tenant_id = $1 AND ($5 OR series_key IN (SELECT unnest($4::text[])))
		), missing AS (
			SELECT 'run ' || run_id AS name FROM unnest($2::uuid[]) AS run_id
			WHERE run_id NOT IN (SELECT run_id FROM chosen_runs)
			UNION ALL
			SELECT 'series ' || key FROM unnest($4::text[]) AS key
			WHERE key NOT IN (SELECT series_key FROM chosen_series)
		)`
	chosenValues = `
		series_number IN (SELECT series_number FROM series_table WHERE tenant_id = $1)
		AND ($5 OR run_id IN (SELECT run_id FROM chosen_runs)
		        OR series_number IN (SELECT series_number FROM chosen_series))`
	countChosen = chosen + `
		SELECT coalesce((SELECT name FROM missing LIMIT 1), ''),
		       (SELECT count(*) FROM chosen_runs),
		       (SELECT coalesce(sum(cardinality("values")), 0) FROM ` + tenantBlocks + `
		        WHERE` + chosenValues + `),
		       (SELECT count(*) FROM chosen_series)`
	eraseChosen = chosen + `, gone_values AS (
			DELETE FROM values_table
			WHERE tenant_id = $1 AND valid_to IS NULL AND` + chosenValues + ` RETURNING 1
		), gone_blocks AS (
			DELETE FROM values_table
			WHERE tenant_id = $1 AND valid_to IS NOT NULL AND` + chosenValues + `
			RETURNING cardinality("values") AS n
		), gone_withdrawals AS (
			DELETE FROM withdrawals_table
			WHERE tenant_id = $1 AND ($5 OR run_id IN (SELECT run_id FROM chosen_runs))
		), gone_runs AS (
			DELETE FROM runs_table
			WHERE tenant_id = $1 AND ($5 OR run_id IN (SELECT run_id FROM chosen_runs)) RETURNING 1
		), gone_series AS (
			DELETE FROM series_table
			WHERE tenant_id = $1
			  AND series_number IN (SELECT series_number FROM chosen_series) RETURNING 1
		)
		SELECT coalesce((SELECT name FROM missing LIMIT 1), ''), (SELECT count(*) FROM gone_runs),
		       (SELECT count(*) FROM gone_values) + (
		           SELECT coalesce(sum(n), 0) FROM gone_blocks),
		       (SELECT count(*) FROM gone_series)`
)

// lose runs query, which counts or erases what was chosen, and returns how much that is.
func (s *store) lose(ctx context.Context, c Caller, tx *sql.Tx, query string, what *erasure) (
	lost loss, err error) {
	// Ids are found by a hash only if PostgreSQL believes that it fits, and else one by one.
	if _, err := tx.ExecContext(ctx, `SET LOCAL work_mem = '1GB'`); err != nil {
		return lost, err
	}
	var missing string
	err = tx.QueryRowContext(ctx, query, c.tenant, pq.Array(what.Runs), what.KnownBefore,
		pq.Array(what.Series), what.Everything).
		Scan(&missing, &lost.runs, &lost.values, &lost.series)
	if missing != "" {
		err = refuse(notFound, "there is no %s; nothing was erased", missing)
	}
	return lost, err
}

// CountChosen tells what erasing takes. What is named by id or key must exist.
func (s *store) CountChosen(ctx context.Context, c Caller, what *erasure) (lost loss, err error) {
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		lost, err = s.lose(ctx, c, tx, countChosen, what)
		return err
	})
	return lost, err
}

// Erase erases all of it or nothing, and leaves a line in the audit trail. Nobody may write
// meanwhile, or a new row could stay without the run or series that goes.
func (s *store) Erase(ctx context.Context, c Caller, what *erasure) (lost loss, err error) {
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx,
			`LOCK TABLE values_table, withdrawals_table IN SHARE ROW EXCLUSIVE MODE`)
		if err != nil {
			return err
		}
		lost, err = s.lose(ctx, c, tx, eraseChosen, what)
		if err != nil {
			return err
		}
		if what.Everything {
			if err := eraseUsers(ctx, c, tx, what.users); err != nil {
				return err
			}
		}
		detail := asJSON(what) + ": " + lost.String()
		return s.audit(ctx, tx, auditLine{action: what.action, tenant: c.tenant, detail: detail})
	})
	return lost, err
}

// eraseUsers erases the tenant's users, if there is a table of them, and their addresses from the
// audit trail.
func eraseUsers(ctx context.Context, c Caller, tx *sql.Tx, exist bool) error {
	_, err := tx.ExecContext(ctx, `UPDATE audit_table SET email = NULL WHERE tenant_id = $1`,
		c.tenant)
	if err != nil || !exist {
		return err
	}
	_, err = tx.ExecContext(ctx, `
		WITH gone AS (DELETE FROM keys_table WHERE tenant_id = $1 RETURNING key_id),
		     gone_uses AS (DELETE FROM key_uses WHERE key_id IN (SELECT key_id FROM gone))
		DELETE FROM users_table WHERE tenant_id = $1`, c.tenant)
	return err
}

// Everything counts what deleting the tables takes, of all tenants.
func (s *store) Everything(ctx context.Context) (lost loss, err error) {
	err = s.eachRow(ctx, nil, `
		SELECT (SELECT count(*) FROM runs_table),
		       (SELECT coalesce(sum(coalesce(cardinality("values"), 1)), 0) FROM values_table),
		       (SELECT count(*) FROM series_table)`,
		nil, func(rows *sql.Rows) error {
			return rows.Scan(&lost.runs, &lost.values, &lost.series)
		})
	return lost, err
}

// Withdraw has reads leave out a run, but those as of a moment before. It returns the JSON that
// shows the withdrawal; if the run was withdrawn before, the first one.
func (s *store) Withdraw(ctx context.Context, c Caller, run uuid, annotation prose) (
	shown json.RawMessage, err error) {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return nil, err
	}
	defer leave()
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		if err := s.lockTenant(ctx, c, tx); err != nil {
			return err
		}
		now, _, err := s.stamp(ctx, tx, 0)
		if err != nil {
			return err
		}
		_, err = s.change(ctx, tx, `
			INSERT INTO withdrawals_table (tenant_id, run_id, change_time, changed_by, annotation)
			SELECT tenant_id, run_id, $3::timestamptz, nullif($4, ''), nullif($5, '')
			FROM runs_table WHERE tenant_id = $1 AND run_id = $2
			ON CONFLICT (tenant_id, run_id) DO NOTHING`,
			c.tenant, run, now, c.email, annotation)
		if err != nil {
			return err
		}
		return s.oneRow(ctx, tx, `
			SELECT row_to_json(shown) FROM (
				SELECT run_id, iso_time(change_time) AS withdrawn_at, changed_by AS withdrawn_by,
				       annotation
				FROM withdrawals_table WHERE tenant_id = $1 AND run_id = $2) AS shown`,
			[]any{c.tenant, run}, &shown)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return nil, refuse(notFound, "run_id: there is no run %q", run)
	}
	return shown, err
}

// correctionsQuery says which corrections to list.
type correctionsQuery struct {
	series       []seriesRef // with match a union; none of both: all
	match        []pattern
	since, until timestamp // since <= change_time < until
	start, end   timestamp // start <= valid_time < end
	changedBy    label     // "": anyone
	tag          label     // "": any
}

// Each correction comes as a block of two: its value, and the one before it. The limit is NULL,
// which is none; but PostgreSQL plans before it knows, for the first rows, and so walks the index
// instead of sorting all there is.
const selectCorrections = `
	SELECT '', '', s.series_id, s.series_key, s.unit, v.run_id, v.run_order, v.version,
	       v.changed_by, v.annotation, v.tags,
	       array_send(ARRAY[v.known_time, v.change_time, v.valid_from]),
	       array_send(ARRAY[v.valid_from, v.valid_from]),
	       array_send(v.valid_time_ends || v.valid_time_ends),
	       array_send(coalesce(v."values", ARRAY[v.value]) || v.old_value)
	FROM values_table v CROSS JOIN LATERAL (
		SELECT series_id, series_key, unit FROM series_table
		WHERE tenant_id = $1 AND series_number = v.series_number OFFSET 0) AS s
	WHERE v.tenant_id = $1 AND v.version > 1 AND v.change_time >= $2 AND v.change_time < $3
	  AND v.valid_from >= $4 AND v.valid_from < $5
	  AND ($6 OR s.series_key LIKE ANY ($7::text[]) OR s.series_id IN (
	           SELECT "ID" FROM json_to_recordset($8) AS named ("ID" uuid)))
	  AND ($9 = '' OR lower(v.changed_by) = lower($9)) AND ($10 = '' OR $10 = ANY (v.tags))
	ORDER BY v.change_time DESC, v.value_id DESC LIMIT $11`

// ListCorrections calls emit, with the value before it, for each of the tenant's corrections that q
// asks for, the newest first. An unknown series is notFound. An error of emit ends it.
func (s *store) ListCorrections(ctx context.Context, c Caller, q correctionsQuery,
	emit func(e *element, old float64) error) error {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return err
	}
	defer leave()
	named, err := s.findSeries(ctx, c, nil, q.series)
	if err != nil {
		return err
	}
	all := len(q.series)+len(q.match) == 0
	args := []any{
		c.tenant,
		q.since, q.until,
		q.start, q.end,
		all, pq.Array(q.match), asJSON(named),
		q.changedBy, q.tag.asTag(),
		nil,
	}
	read := blockReader{lead: -1}
	return s.eachRow(ctx, nil, selectCorrections, args, func(rows *sql.Rows) error {
		_, block, err := read.decode(rows)
		if err != nil {
			return err
		}
		return emit(&block[0], block[1].value)
	})
}

// ---- Lists

// ListSeries calls emit for each series of the caller's tenant that matches, or with no pattern for
// all, by series_key, with its id and the JSON that shows it: with stats also what is stored of it.
func (s *store) ListSeries(ctx context.Context, c Caller, match []pattern, stats bool,
	emit func(id string, shown []byte) error) error {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return err
	}
	defer leave()
	row := func(rows *sql.Rows) error {
		var id string
		var shown sql.RawBytes
		if err := rows.Scan(&id, &shown); err != nil {
			return err
		}
		return emit(id, shown)
	}
	args := []any{c.tenant, pq.Array(match)}
	if stats {
		return s.eachRow(ctx, nil, listSeriesWithStats, args, row)
	}
	return s.eachRow(ctx, nil, listSeries, args, row)
}

const (
	listSeriesStart = `
		SELECT s.series_id, row_to_json(shown)
		FROM (SELECT * FROM series_table
		      WHERE tenant_id = $1 AND ($2::text[] IS NULL OR series_key LIKE ANY ($2))) AS s,
		     LATERAL (SELECT s.series_key, s.description, s.unit`
	listSeriesEnd = `) AS shown
		ORDER BY s.series_key COLLATE "C"`
	listSeries          = listSeriesStart + listSeriesEnd
	listSeriesWithStats = listSeriesStart + `,
		       replace(iso_time(min(v.valid_from)), '.000000', '') AS first_valid_time,
		       replace(iso_time(max(v.valid_to)), '.000000', '') AS last_valid_time,
		       coalesce(sum(cardinality(v."values")), 0) AS "values",
		       iso_time(max(v.change_time)) AS last_change_time
		FROM ` + tenantBlocks + ` WHERE v.series_number = s.series_number` + listSeriesEnd
)

// runsQuery says which runs to list.
type runsQuery struct {
	workflow             label     // "": any
	series               seriesRef // they hold values of it; none: of any
	startKnown, endKnown timestamp // start <= known_time < end
	limit                count
}

// ListRuns calls emit, with the JSON that shows it, for each of the tenant's runs that q asks for,
// the newest known first; and for one beyond the limit, if there is one.
func (s *store) ListRuns(ctx context.Context, c Caller, q runsQuery,
	emit func(shown []byte) error) error {
	ctx, leave, err := s.enter(ctx, c)
	if err != nil {
		return err
	}
	defer leave()
	row := func(rows *sql.Rows) error {
		var shown sql.RawBytes
		if err := rows.Scan(&shown); err != nil {
			return err
		}
		return emit(shown)
	}
	args := []any{
		c.tenant, q.workflow,
		q.startKnown, q.endKnown,
		int64(q.limit) + 1,
	}
	if q.series == (seriesRef{}) {
		return s.eachRow(ctx, nil, listRuns, args, row)
	}
	found, err := s.findSeries(ctx, c, nil, []seriesRef{q.series})
	if err != nil {
		return err
	}
	return s.eachRow(ctx, nil, listRunsOfSeries, append(args, found[0].ID), row)
}

const (
	listRunsStart = `
		SELECT left(row_to_json(r)::text, -1) || coalesce((  -- or the members of its withdrawal
			SELECT ',' || substr(row_to_json(w)::text, 2) FROM (
				SELECT iso_time(change_time) AS withdrawn_at, changed_by AS withdrawn_by, annotation
				FROM withdrawals_table WHERE tenant_id = $1 AND run_id = r.run_id) AS w), '}')
		FROM (
			SELECT run_id, workflow_id, iso_time(run_start_time) AS run_start_time,
			       iso_time(run_finish_time) AS run_finish_time,
			       iso_time(t.known_time) AS known_time, run_params, changed_by,
			       iso_time(inserted_at) AS inserted_at,
			       rows_inserted AS rows
			FROM `
	listRunsEnd = ` AS t
			WHERE tenant_id = $1 AND ($2 = '' OR workflow_id = $2)
			  AND t.known_time >= $3 AND t.known_time < $4
			ORDER BY t.known_time DESC, run_order DESC LIMIT $5) AS r`
	listRuns = listRunsStart + `runs_table` + listRunsEnd

	// OFFSET 0 has the series' blocks read once, and then each run looked up by its id.
	listRunsOfSeries = listRunsStart + `(
				SELECT r.* FROM (
					SELECT DISTINCT ON (run_id) run_id FROM ` + tenantBlocks + `
					WHERE series_number = (
					          SELECT series_number FROM series_table
					          WHERE tenant_id = $1 AND series_id = $6)
					  AND known_time >= $3 AND known_time < $4 ORDER BY run_id OFFSET 0) AS b
				CROSS JOIN LATERAL (
					SELECT * FROM runs_table
					WHERE tenant_id = $1 AND run_id = b.run_id OFFSET 0) AS r)` + listRunsEnd
)
